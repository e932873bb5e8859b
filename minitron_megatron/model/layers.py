"""One layer at a time: the arguments that mcore calls a layer with, and the tensors that pass through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from .chunk import Chunk, Model, chunks_of
from .megatron_names import field_of
from .schedule import MicroBatch, run_chunk

if TYPE_CHECKING:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from megatron.core.transformer.transformer_layer import TransformerLayer

__all__ = ["FUSED_NORM", "Arguments", "fused_norm", "layer_arguments", "layers_of", "run_layer"]

FUSED_NORM = "layer_norm_weight"
"""Weight of a norm that Transformer Engine keeps inside a linear layer."""

Arguments = Mapping[str, Any]
"""Keyword arguments of a layer's forward pass: rotary embedding, attention mask and the like."""

Seen = dict[str, Any]
"""Point of a layer -> the tensor that passes it; the router gives a tuple of them."""

POINTS = ("qkv", "proj", "middle", "mlp", "router", "fc2", "out")
"""Points of a layer in the order of computation: the input of the QKV projection, of the attention's output projection,
the residual stream after attention, the MLP's normed input, the router's output, the input of (shared) fc2, and the
layer's output."""


class _Enough(Exception):
    """Everything wanted of a layer has been seen; the rest need not be computed."""


class _Arguments(nn.Module):
    """Stand-in for a layer that stores its arguments and returns its input."""

    arguments: Arguments

    def forward(self, **arguments: Any) -> tuple[Tensor, None]:
        self.arguments = arguments
        return arguments["hidden_states"], None


def fused_norm(linear: TELayerNormColumnParallelLinear, states: Tensor) -> Tensor:
    """Return the output of the norm that Transformer Engine keeps inside a linear layer; no hook sees it."""
    weight = getattr(linear, FUSED_NORM) + int(field_of(linear, "zero_centered_norm"))
    eps = field_of(linear, "norm_eps")
    if field_of(linear, "norm") == "RMSNorm":
        return F.rms_norm(states, weight.shape, weight, eps)
    return F.layer_norm(states, weight.shape, weight, linear.layer_norm_bias, eps)


def layers_of(model: Model) -> dict[int, TransformerLayer]:
    """This rank's layers by their number in the whole model, from 0."""
    return {layer.layer_number - 1: layer for chunk in chunks_of(model) for layer in chunk.decoder.layers}


def layer_arguments(chunk: Chunk, batch: MicroBatch, entering: Tensor | None = None) -> Arguments:
    """Return the arguments that mcore calls a chunk's layers with; `hidden_states` is what enters the first one.

    entering: the states from the pipeline stage before; None on the first stage, where the embedding gives them.
    Collective over tp.
    """
    stand_in, whole = _Arguments(), chunk.decoder.layers
    chunk.decoder.layers = nn.ModuleList([stand_in])
    if entering is not None:
        chunk.set_input_tensor(entering)
    try:
        run_chunk(chunk, batch)
    finally:
        chunk.decoder.layers = whole
    return stand_in.arguments


def run_layer(layer: TransformerLayer, arguments: Arguments, states: Tensor, points: Collection[str]) -> Seen:
    """Run a layer on other states and return what passes the `points` asked for; it stops at the last of them.

    Collective over tp, and over the ranks of a mixture's experts.
    """
    seen: Seen = {}
    last = max(points, key=POINTS.index)
    with ExitStack() as hooks:
        for point in points:
            if point != "out":
                hooks.enter_context(_hooked(layer, point, seen, stop=point == last))
        try:
            out = layer(**{**arguments, "hidden_states": states})
        except _Enough:
            return seen
    return seen | {"out": out[0].detach()}


@contextmanager
def _hooked(layer: TransformerLayer, point: str, seen: Seen, *, stop: bool) -> Iterator[None]:
    module, output = _place(layer, point)

    def see(value: object) -> None:
        seen[point] = value
        if stop:
            raise _Enough

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        states = args[0].detach()
        see(fused_norm(module, states) if hasattr(module, FUSED_NORM) else states)

    def after(module: nn.Module, args: tuple[Tensor, ...], out: object) -> None:
        see(out)

    hook: Callable[..., object] = after if output else before
    handle = module.register_forward_hook(hook) if output else module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _place(layer: TransformerLayer, point: str) -> tuple[nn.Module, bool]:
    """(module, whether its output is meant and not its input)."""
    attention, mlp = layer.self_attention, layer.mlp
    mixture = hasattr(mlp, "router")
    if point == "mlp":
        return (mlp if mixture else mlp.linear_fc1), False
    if point == "fc2":
        return (mlp.shared_experts if mixture else mlp).linear_fc2, False
    if point == "router":
        return mlp.router, True
    return {"qkv": attention.linear_qkv, "proj": attention.linear_proj, "middle": layer.pre_mlp_layernorm}[point], False
