"""The recipe's keys for the search over shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..errors import did_you_mean
from ..layout import PUBLIC_AXES
from ..search import FILLED, GPUS, Limit, Space
from .keys import Count, FilePath, HowToRun, Keys, NotNegative, Positive, Steps

__all__ = ["CHOOSE_BY", "Budget", "Light", "Search", "Serving"]

AXES = ("layers", *PUBLIC_AXES)
CHOOSE_BY = ("loss", "pareto")
"""Values of `choose` besides the name of a task."""
MOST_SIZES = 10_000
"""Of one axis."""


def _sizes(value: Any) -> Any:
    """`{from: 16, to: 32, step: 4}` as its numbers, both ends among them; a single number as itself."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, dict):
        return value
    if sorted(value) != ["from", "step", "to"] or not all(isinstance(end, int) for end in value.values()):
        raise ValueError("Give a list of sizes, or {from: 16, to: 32, step: 4}")
    if value["step"] < 1 or value["to"] < value["from"]:
        raise ValueError("A range goes up, in steps of 1 at least")
    if (value["to"] - value["from"]) // value["step"] >= MOST_SIZES:
        raise ValueError(f"A range has at most {MOST_SIZES:,} sizes")
    return tuple(range(value["from"], value["to"] + 1, value["step"]))


def _window(value: Any) -> Any:
    """A number is the most that is allowed; a pair, what is allowed at least and at most."""
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError("Give the most that is allowed, or [at least, at most]")
        return tuple(None if end is None else float(end) for end in value)
    return (None, float(value))


def _floor(value: Any) -> Any:
    """A number is the least that will do."""
    return _window(value) if isinstance(value, list | tuple) else (float(value), None)


def _multiples(value: Any) -> Any:
    """Words are refused here, where pydantic would tell of each alternative."""
    if not isinstance(value, dict):
        return value
    for axis, unit in value.items():
        if axis not in AXES:
            raise ValueError(f"multiples names the axis {axis!r}.{did_you_mean(str(axis), AXES)}")
        if isinstance(unit, str) and not unit[:1].isdigit() and (axis, unit) != ("hidden", FILLED):
            raise ValueError(f"multiples.{axis} is {unit!r}. Give a number, or for hidden {FILLED!r}")
    return value


Multiples = Annotated[dict[str, Count | Literal["heads x head_dim"]], BeforeValidator(_multiples)]
Sizes = Annotated[tuple[Count, ...], BeforeValidator(_sizes), Field(min_length=1)]
Window = Annotated[tuple[float | None, float | None], BeforeValidator(_window)]
AtLeast = Annotated[tuple[float | None, float | None], BeforeValidator(_floor)]


class Budget(Keys):
    """What a candidate may have: the most that is allowed, or [at least, at most]. All that is given must hold."""

    params: Window | None = None
    """Parameters."""
    active_params: Window | None = None
    """Parameters that one token goes through: of a mixture, as many experts as it is sent to."""
    memory_bytes: Window | None = None
    """Weights, and the keys and values of `serving.batch` sequences of `serving.context` tokens."""
    flops_per_token: Window | None = None
    """Of a forward pass at `serving.context`."""
    decode_ms: Window | None = None
    """Milliseconds of a decoding step, by `serving.gpu` or `serving.table`."""
    tokens_per_second: AtLeast | None = None
    """Decoded, of the whole batch: the least that will do, or [at least, at most]."""

    def limits(self) -> dict[str, Limit]:
        return {key: Limit(*window) for key in type(self).model_fields if (window := getattr(self, key)) is not None}


class Serving(Keys):
    """How the student will be served, for the budgets that depend on it."""

    batch: Count = 1
    """Sequences at a time."""
    context: Count | None = None
    """Tokens of each in the cache; left out: `data.sequence`."""
    weights: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    """What weights are held in."""
    kv_cache: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    """What keys and values are held in."""
    gpu: str | None = None
    """Speed by this GPU's data sheet: the bytes of a step over its bandwidth, or FLOPs over its peak; no overhead."""
    table: FilePath | None = None
    """Speed fitted to a `bench/table.json` of `minitron bench --backend torch`."""

    @model_validator(mode="after")
    def _one_speed(self) -> Serving:
        if self.gpu and self.table:
            raise ValueError("Speed is by gpu or by table: leave one out")
        if self.gpu not in (None, *GPUS):
            raise ValueError(f"The GPU {self.gpu!r} is not known.{did_you_mean(str(self.gpu), GPUS)}")
        return self


class Light(Keys):
    """Light distillation of candidates: their order right after the cut is not yet the one that lasts."""

    top: Count | None = 10
    """How many, the best by their loss right after the cut; null: all of them, as the paper does."""
    tokens: Count = 1_887_436_800
    """Of each; rounded up to whole steps. The paper's 400 steps."""
    halvings: Annotated[Steps, Field(le=32)] = 0
    """The worse half leaves at half of the steps; 2: at a quarter as well, and so on."""
    measure_every: Count = 50
    """Steps between the losses that ranks are compared by."""
    independent_replicas: HowToRun[bool] = False
    """Each data-parallel replica trains candidates of its own, instead of all of them each together: no gradient
    travels, but each replica holds all of an optimizer."""
    global_batch: Count | None = None
    """This and what follows: left out, as `distill` has it."""
    micro_batch: HowToRun[Count | None] = None
    lr: Positive | None = None
    min_lr: NotNegative | None = None
    warmup_steps: Steps | None = None


class Search(Keys):
    """Which shape: sizes to try on each axis, alone or as {from: 16, to: 32, step: 4}, within a budget. The winner is
    pruned and distilled as if `prune` named its sizes."""

    layers: Sizes | None = None
    """Which go is chosen by `score.depth`, and `prune.contiguous`."""
    hidden: Sizes | None = None
    """Channels of the residual stream."""
    ffn: Sizes | None = None
    """Neurons a layer."""
    expansion: tuple[Positive, ...] = ()
    """Instead of `ffn`: neurons over hidden channels, as the paper's grid has it."""
    heads: Sizes | None = None
    """Query heads in total."""
    kv_groups: Sizes | None = None
    """Keys and values; without `heads` each takes its query heads along."""
    experts: Sizes | None = None
    """Experts of each mixture."""
    expert_ffn: Sizes | None = None
    """Neurons of each expert."""
    shared_ffn: Sizes | None = None
    """Neurons of the experts that every token goes through."""
    multiples: Multiples = Field(default_factory=dict)
    """Axis -> what its sizes must be multiples of; others are left out. `hidden: heads x head_dim` keeps the shapes
    whose hidden size is equal to that: some clients read no other (docs/guide/serving.md)."""
    budget: Budget
    """What the student may have."""
    serving: Serving = Serving()
    light: Light | None = Light()
    """null: the order right after the cut decides."""
    choose: str = "loss"
    """What the winner has best: `loss`, held out; `pareto`, the knee of loss against the first budget; or the name of a
    task of `evaluate`."""
    winner: str | None = None
    """The name of the candidate to go on with, whatever `choose` says."""

    @model_validator(mode="after")
    def _has_a_budget(self) -> Search:
        if not self.budget.limits():
            raise ValueError("A search needs a budget: set budget.params, or another")
        return self

    def space(self) -> Space:
        sizes = {axis: tuple(given) for axis in AXES if (given := getattr(self, axis)) is not None}
        return Space(sizes, self.expansion, self.multiples)
