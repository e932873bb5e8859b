"""The ModelConfig of any GPTModel. A setting that changes what a model computes, and that a ModelConfig cannot express,
is an error that names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..layout import Shape, layer_of, pattern_of
from .chunk import Chunk
from .config import HfConfig, ModelConfig, rotary_frequencies
from .megatron_names import (
    FUNCTIONS,
    LLAMA3,
    POSITIONS,
    field_of,
    from_megatron,
    is_execution_setting,
    is_unused,
    shape_of,
    transformer_settings,
)
from .shards import named_shards

if TYPE_CHECKING:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

__all__ = ["changed_settings", "config_of", "default_settings"]

BALANCING, LOSSES = "moe_router_load_balancing_type", {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}
"""mcore's setting, and its values that do not change the routing."""


def config_of(model: Chunk) -> ModelConfig:
    """Return the config of a GPTModel: the attribute `minitron` of models built here, else read from mcore's settings.

    Raises ModelError, which names the setting, where a ModelConfig cannot express what the model computes.
    """
    ours: ModelConfig | None = getattr(model, "minitron", None)
    if ours is not None:
        return ours
    positions = getattr(model, "position_embedding_type", None)
    if positions != POSITIONS["position_embedding_type"]:
        raise _inexpressible("position_embedding_type", positions, "'rope'")
    if model.mtp_process:
        raise _inexpressible("mtp_block_spec", "a block", None)
    shape = shape_of(model)
    functions = FUNCTIONS if shape.experts else {name: FUNCTIONS[name] for name in FUNCTIONS if name[:4] != "moe_"}
    config = ModelConfig(
        shape=shape,
        max_positions=field_of(model, "max_positions"),
        rotary_share=field_of(model, "rotary_share"),
        rotary_base=field_of(model, "rotary_base"),
        **from_megatron(functions, model.config),
    )
    reference = default_settings(config)
    settings = {name: getattr(model.config, name) for name in reference}
    for name, found, wanted in changed_settings(settings, reference, config):
        raise _inexpressible(name, found, repr(wanted))
    _check_parameters(model, shape)
    return replace(config, rotary_scaling=_rotary_scaling(model.rotary_pos_emb, config))


def changed_settings(
    found: Mapping[str, Any], wanted: Mapping[str, object], config: ModelConfig
) -> Iterator[tuple[str, object, object]]:
    """Yield (name, value found, value wanted) of each setting by which two models compute different things.

    wanted: all settings of the model of `config`, with mcore's defaults.
    """
    for name, value in wanted.items():
        if is_execution_setting(name) or name == "activation_func" or is_unused(name, config):
            continue  # `activation_name` compares activations by their values
        if found[name] != value and not (name == BALANCING and _balances_by_loss(found[name])):
            yield name, found[name], value


def _balances_by_loss(kinds: str | Sequence[str]) -> bool:
    """Return whether the load of experts is balanced by losses only, or not at all: the routing does not change."""
    return {kinds} <= LOSSES if isinstance(kinds, str) else set(kinds) <= LOSSES


def default_settings(config: ModelConfig) -> dict[str, object]:
    """Return all settings of the TransformerConfig that has mcore's defaults beside those of `config`."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    reference = TransformerConfig(**transformer_settings(config))
    return {field.name: getattr(reference, field.name) for field in fields(TransformerConfig)}


def _check_parameters(model: Chunk, shape: Shape) -> None:
    """Raise ModelError where layers have other parameters than the settings say: layer specs can add modules."""
    found = {pattern_of(shard.name) for shard in named_shards(model)}
    known = {pattern_of(name) for name in shape.names()}
    expected = {pattern for pattern in known if layer_of(pattern.replace("*", "0")) is not None}
    if other := sorted(found - known | (expected - found if len(model.decoder.layers) else set())):
        raise ModelError(
            f"the model's layer spec and its settings do not agree on {', '.join(other)}. "
            "Build it from a spec that fits its TransformerConfig."
        )


def _rotary_scaling(rotary: RotaryEmbedding, config: ModelConfig) -> HfConfig | None:
    """Return the rotary scaling whose frequencies a GPTModel uses. config: without scaling."""
    found = rotary.inv_freq.cpu() / (rotary.seq_len_interpolation_factor or 1)
    for scaling in (None, *_scalings(found, config)):
        frequencies = rotary_frequencies(replace(config, rotary_scaling=scaling))
        if frequencies.shape == found.shape and torch.allclose(frequencies, found, rtol=1e-5, atol=0):
            return scaling
    raise ModelError(
        "the model's rotary frequencies (rotary_pos_emb.inv_freq) are not those of its rotary_base and rotary_percent "
        "with rope_scaling or seq_len_interpolation_factor. Use one of these."
    )


def _scalings(found: Tensor, config: ModelConfig) -> Iterator[HfConfig]:
    """Yield a linear and a llama3 scaling, each with the factor by which the lowest frequency becomes the one found."""
    plain = rotary_frequencies(config)[-1]
    yield {"rope_type": "linear", "factor": _rounded(plain / found[-1])}
    llama3 = {"rope_type": "llama3", **LLAMA3}
    half = rotary_frequencies(replace(config, rotary_scaling={**llama3, "factor": 2.0}))[-1]
    if half == plain:  # no frequency is low enough to be scaled, by any factor
        return
    inverse = 1 - (plain - found[-1]) / (2 * (plain - half))  # a frequency is linear in 1 / factor
    if inverse > 0:
        yield {**llama3, "factor": _rounded(1 / inverse)}


def _rounded(factor: Tensor) -> float:
    return float(f"{factor.item():.6g}")  # fp32 holds about seven digits


def _inexpressible(name: str, found: object, wanted: str | None) -> ModelError:
    return ModelError(
        f"the model sets {name}={found!r}, which this package cannot express: here it would be {wanted}. "
        "Such a model can be scored, pruned and distilled, but not exported."
    )
