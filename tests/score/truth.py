"""Reference scores: hooks on transformers' modules, one sample at a time, and a few lines of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_megatron.data import Batch
from minitron_megatron.layout import Shape
from minitron_megatron.records import Scores, Statistic

SAMPLES = 12

Seen = dict[tuple[str, int], list[Tensor]]
"""(module, layer) -> activations of each sample at the counted positions: [positions, units]."""

Values = dict[str, dict[int | None, Tensor]]


def activations(folder: Path, every: Batch) -> Seen:
    from transformers import AutoModelForCausalLM

    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), {}

    def keep(name: str, layer: int) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Tensor, ...], out: Tensor | None = None) -> None:
            seen.setdefault((name, layer), []).append((arguments[0] if out is None else out)[0].double())

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.register_forward_hook(keep("pre", i))
        layer.mlp.down_proj.register_forward_pre_hook(keep("post", i))
        layer.self_attn.o_proj.register_forward_pre_hook(keep("heads", i))
        layer.input_layernorm.register_forward_hook(keep("norm1", i))
        layer.post_attention_layernorm.register_forward_hook(keep("norm2", i))
    for tokens, mask in zip(every.tokens, every.mask, strict=True):
        with torch.no_grad():
            model(tokens[mask].unsqueeze(0))
    return seen


REDUCE = {
    "mean": lambda a: a.abs().mean(0),
    "l2": lambda a: a.norm(dim=0),
    "var": lambda a: a.var(0, unbiased=False),
}


def truth(seen: Seen, statistic: Statistic, shape: Shape) -> Values:
    def reduced(samples: list[Tensor]) -> Tensor:
        return REDUCE[statistic.batch](torch.stack([REDUCE[statistic.sequence](a) for a in samples]))

    def heads(layer: int) -> Tensor:
        by_head = [a.unflatten(1, (shape.heads, shape.head_dim)) for a in seen["heads", layer]]
        if statistic.heads == "norm_first":
            return reduced([a.norm(dim=2) for a in by_head])
        return reduced(by_head).norm(dim=1)

    layers = range(shape.layers)
    return {
        "ffn": {i: reduced(seen[statistic.neurons, i]) for i in layers},
        "heads": {i: heads(i) for i in layers},
        "hidden": {None: sum(reduced(seen[norm, i]) for norm in ("norm1", "norm2") for i in layers)},
    }


def expect_truth(scores: Scores, truth: Values) -> None:
    assert {axis: list(layers) for axis, layers in scores.values.items()} == {a: list(ls) for a, ls in truth.items()}
    for axis, layers in truth.items():
        for layer, units in layers.items():
            error = (scores.values[axis][layer] - units).abs().max() / units.max()
            assert error < 1e-5, f"{scores.statistic} of {axis} in layer {layer}: off by {error:.1e} of the largest"
