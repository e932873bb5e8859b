"""Chunks of mcore models: what this package uses of them, named and typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, Self

from torch import Tensor, nn

from .config import ModelConfig

if TYPE_CHECKING:
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["Chunk", "Model", "WrappedChunk", "chunks_of"]


class Chunk(Protocol):
    """Pipeline stage of a model, or one of its virtual stages: mcore's GPTModel, built here or by a user."""

    config: TransformerConfig
    decoder: TransformerBlock
    rotary_pos_emb: RotaryEmbedding
    minitron: ModelConfig
    """Only of models built here: read it with `config_of`."""
    vocab_size: int
    """Rows of the whole embedding, padding included."""
    pre_process: bool
    """Whether it holds the embedding."""
    post_process: bool
    """Whether it holds the output layer."""
    share_embeddings_and_output_weights: bool
    position_embedding_type: str
    rotary_scaling: bool
    mtp_process: bool
    vp_stage: int | None
    embedding: LanguageModelEmbedding
    output_layer: ColumnParallelLinear
    training: bool

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def shared_embedding_or_output_weight(self) -> Tensor: ...

    def set_input_tensor(self, input_tensor: Tensor) -> None: ...

    def sharded_state_dict(self, *, metadata: Mapping[str, object]) -> dict[str, object]: ...

    def load_state_dict(self, state_dict: Mapping[str, object], strict: bool = True) -> object: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...


class WrappedChunk(Protocol):
    """Chunk in training: mcore's DistributedDataParallel around it."""

    module: Chunk


Model = Chunk | Sequence[Chunk]
"""One chunk, or the list of a rank's chunks."""


def chunks_of(model: Model) -> list[Chunk]:
    """Return the list of a model's chunks (more than one only with virtual pipeline stages)."""
    return list(model) if isinstance(model, Sequence) else [model]
