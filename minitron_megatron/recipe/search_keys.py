"""Recipe keys of the search over shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ..errors import did_you_mean
from ..layout import SIZED_AXES
from ..search import FILLED, Limit, Serving, Space
from ..settings import (
    BeforeValidator,
    Count,
    Field,
    HowToRun,
    NotNegative,
    Positive,
    Settings,
    Steps,
    model_validator,
)

__all__ = ["CHOOSE_BY", "Budget", "Light", "Search", "Serving"]

CHOOSE_BY = ("loss", "pareto")
"""Values of `choose` other than the name of a task."""
MOST_SIZES = 10_000
"""Most sizes of one axis."""


def _sizes(value: object) -> object:
    """Expand `{from: 16, to: 32, step: 4}` into a tuple, both ends included; wrap a single number in a tuple."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, dict):
        return value
    if sorted(value) != ["from", "step", "to"] or not all(isinstance(end, int) for end in value.values()):
        raise ValueError("Give a list of sizes, or {from: 16, to: 32, step: 4}")
    if value["step"] < 1 or value["to"] < value["from"]:
        raise ValueError("A range needs from <= to and a step of at least 1")
    if (value["to"] - value["from"]) // value["step"] >= MOST_SIZES:
        raise ValueError(f"Give a range of at most {MOST_SIZES:,} sizes: set a larger step, or a lower to")
    return tuple(range(value["from"], value["to"] + 1, value["step"]))


def _window(value: Any) -> tuple[float | None, ...]:
    """Turn a maximum, or a pair [minimum, maximum], into (minimum, maximum)."""
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError("Give one number (the limit), or a pair [minimum, maximum]")
        return tuple(None if end is None else float(end) for end in value)
    return (None, float(value))


def _floor(value: Any) -> tuple[float | None, ...]:
    """Turn a minimum, or a pair [minimum, maximum], into (minimum, maximum)."""
    return _window(value) if isinstance(value, list | tuple) else (float(value), None)


def _multiples(value: object) -> object:
    """Refuse unknown axes and text with one message (pydantic gives one per alternative)."""
    if not isinstance(value, dict):
        return value
    for axis, unit in value.items():
        if axis not in SIZED_AXES:
            raise ValueError(f"multiples has the unknown axis {axis!r}.{did_you_mean(str(axis), SIZED_AXES)}")
        if isinstance(unit, str) and not unit[:1].isdigit() and (axis, unit) != ("hidden", FILLED):
            raise ValueError(f"multiples.{axis} is {unit!r}. Give a whole number; hidden may also be {FILLED!r}")
    return value


Multiples = Annotated[dict[str, Count | Literal["heads x head_dim"]], BeforeValidator(_multiples)]
Sizes = Annotated[tuple[Count, ...], BeforeValidator(_sizes), Field(min_length=1)]
Window = Annotated[tuple[float | None, float | None], BeforeValidator(_window)]
AtLeast = Annotated[tuple[float | None, float | None], BeforeValidator(_floor)]


class Budget(Settings):
    """Limits on a candidate: a maximum, or [minimum, maximum]. A candidate must meet all that are given."""

    params: Window | None = None
    """Total parameters."""
    active_params: Window | None = None
    """Parameters used per token: in an MoE layer, only the experts to which a token is routed."""
    memory_bytes: Window | None = None
    """Bytes of the weights and of the KV cache of `serving.batch` sequences of `serving.context` tokens."""
    flops_per_token: Window | None = None
    """FLOPs per token of a forward pass at `serving.context`."""
    decode_ms: Window | None = None
    """Milliseconds per decoding step, by `serving.gpu` or `serving.table`."""
    tokens_per_second: AtLeast | None = None
    """Tokens decoded per second, over the whole batch: here a single number is the minimum."""

    def limits(self) -> dict[str, Limit]:
        return {key: Limit(*window) for key in type(self).model_fields if (window := getattr(self, key)) is not None}


class Light(Settings):
    """Short distillation of candidates, since their ranking right after pruning changes with training."""

    top: Count | None = 10
    """Number of candidates to distil: the best by their loss right after pruning. null: all, as in the paper."""
    tokens: Count = 1_887_436_800
    """Tokens per candidate, rounded up to whole steps. The default is the paper's 400 steps."""
    halvings: Annotated[Steps, Field(le=32)] = 0
    """Successive halving: 1 drops the worse half of the candidates at half of the steps; 2 also at a quarter of the
    steps; and so on."""
    measure_every: Count = 50
    """Steps between the validation losses by which candidates are ranked."""
    independent_replicas: HowToRun[bool] = False
    """Let each data-parallel replica train different candidates, instead of all replicas the same one. No gradients are
    exchanged between replicas, but each holds the full optimizer state."""
    global_batch: Count | None = None
    """Samples per step. Default: as in `distill`."""
    micro_batch: HowToRun[Count | None] = None
    """Samples per forward pass of one data-parallel rank. Default: as in `distill`."""
    lr: Positive | None = None
    """Peak learning rate. Default: as in `distill`."""
    min_lr: NotNegative | None = None
    """Learning rate at the end of the cosine. Default: as in `distill`."""
    warmup_steps: Steps | None = None
    """Steps of linear warm-up. Default: as in `distill`."""


class Search(Settings):
    """Search over shapes within a budget. Each axis takes a size, a list of sizes, or {from: 16, to: 32, step: 4}. The
    winner is pruned and distilled as if `prune` gave its sizes."""

    budget: Budget
    """Limits on the student."""
    layers: Sizes | None = None
    """Numbers of layers to keep; `score.depth` and `prune.contiguous` choose which."""
    hidden: Sizes | None = None
    """Hidden sizes: channels of the residual stream."""
    ffn: Sizes | None = None
    """MLP intermediate sizes: neurons per layer."""
    expansion: tuple[Positive, ...] = ()
    """Ratios of `ffn` to `hidden`, instead of `ffn`, as in the paper's grid."""
    heads: Sizes | None = None
    """Query heads in total."""
    kv_groups: Sizes | None = None
    """KV heads. Without `heads`, the query heads of each removed KV head go with it."""
    experts: Sizes | None = None
    """Experts per MoE layer."""
    expert_ffn: Sizes | None = None
    """Neurons per expert."""
    shared_ffn: Sizes | None = None
    """Neurons of the shared experts, which process every token."""
    multiples: Multiples = Field(default_factory=dict)
    """Axis -> number of which its sizes must be multiples; other sizes are skipped. `hidden: heads x head_dim` keeps
    only shapes whose hidden size equals heads x head_dim, as some inference engines need (docs/guide/serving.md)."""
    serving: Serving = Serving()
    light: Light | None = Light()
    """Short distillation of the best candidates. null: rank candidates by their loss right after pruning."""
    choose: str = "loss"
    """How the winner is chosen: `loss`, the lowest held-out loss; `pareto`, the knee of the curve of loss against the
    first budget; or the name of a task of `evaluate`, the best score."""
    winner: str | None = None
    """Name of the candidate to use, in place of the one that `choose` selects."""

    @model_validator(mode="after")
    def _has_a_budget(self) -> Search:
        if not self.budget.limits():
            raise ValueError("A search needs a budget: set budget.params or another key of budget")
        return self

    def space(self) -> Space:
        sizes = {axis: tuple(given) for axis in SIZED_AXES if (given := getattr(self, axis)) is not None}
        return Space(sizes, self.expansion, self.multiples)
