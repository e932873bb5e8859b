"""Pairs of teacher and student hidden states to match, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from typing import Annotated, Literal, NamedTuple

from .. import numbers
from ..errors import RecipeError
from ..layout import Shape
from ..losses import STATE_LOSSES
from ..parallel import Topology
from ..settings import AfterValidator, BeforeValidator, Field, Positive, Settings, model_validator

__all__ = ["ATTENTION", "MLP_INPUTS", "OUTPUTS", "LayerPair", "StatePairs"]

OUTPUTS, MLP_INPUTS, ATTENTION = "outputs", "mlp_inputs", "attention"

DYNAMIC: Literal["dynamic"] = "dynamic"


class LayerPair(NamedTuple):
    """A hidden state of the teacher and one of the student. The embedding is the output of layer -1."""

    kind: str
    teacher: int
    """The teacher's layer, from 0."""
    student: int
    """The student's layer, from 0."""

    def __str__(self) -> str:
        return "embedding" if self.teacher < 0 else f"{self.kind} {self.teacher}:{self.student}"


def at_layer(kind: str, layer: int, shape: Shape) -> int:
    """Return the layer on whose pipeline stage a state is read: an output is read after the norm of the next layer."""
    return min(layer + 1, shape.layers - 1) if kind == OUTPUTS else layer


def _alpha(value: object) -> object:
    """Check the weight of the loss on states, with one message (pydantic gives one per alternative)."""
    if value != DYNAMIC and not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"Give a number above 0, or {DYNAMIC}")
    return value


Layers = tuple[Annotated[str, BeforeValidator(str)], ...]
"""Pairs `teacher:student`."""


class StatePairs(Settings):
    """Distillation of hidden states. Layers are written as `"teacher:student"`, in quotes, each numbered from 0 in its
    own model. If the hidden sizes differ, a trained linear map projects the student's states to the teacher's size.
    """

    embedding: bool = False
    """Match the embedding, after the first norm."""
    outputs: Layers = ()
    """Match layer outputs, after the norm that follows. The papers, for a student with far fewer layers: the third to
    last layer of each model, together with the embedding."""
    mlp_inputs: Layers = ()
    """Match MLP inputs, after the norm before the MLP. The papers found no gain."""
    attention: Layers = ()
    """Match attention relations, as in MiniLMv2: query-query, key-key and value-value similarities between tokens. The
    papers found no gain."""
    loss: Annotated[str, AfterValidator(STATE_LOSSES.known), Field(examples=[*STATE_LOSSES])] = "cosine"
    """Loss between states: cosine or mse. Not used for `attention`."""
    alpha: Annotated[Positive | Literal["dynamic"], BeforeValidator(_alpha)] = DYNAMIC
    """Weight of the loss on states. `dynamic` updates it in each step so that the loss on states is as large as the
    loss on logits."""

    @model_validator(mode="after")
    def _matches_something(self) -> StatePairs:
        if not self.pairs:
            kinds = ", ".join(["embedding", OUTPUTS, MLP_INPUTS, ATTENTION])
            raise RecipeError(f"no states to match are given. Set at least one of {kinds}.")
        return self

    @property
    def dynamic(self) -> bool:
        return self.alpha == DYNAMIC

    @cached_property
    def pairs(self) -> tuple[LayerPair, ...]:
        found = [LayerPair(OUTPUTS, -1, -1)] if self.embedding else []
        for kind in (OUTPUTS, MLP_INPUTS, ATTENTION):
            found += [_parsed(kind, written) for written in getattr(self, kind)]
        return tuple(found)

    def check(self, teacher: Shape, student: Shape, topology: Topology) -> None:
        """Raise RecipeError for a layer that does not exist, a pair whose states are on two pipeline stages, and
        attention relations with context parallelism."""
        if topology.cp > 1 and any(pair.kind == ATTENTION for pair in self.pairs):
            raise RecipeError(
                f"states {ATTENTION} needs whole sequences on each rank, but cp={topology.cp} splits them. Set cp to 1."
            )
        for pair in self.pairs:
            for model, layer, shape in (("teacher", pair.teacher, teacher), ("student", pair.student, student)):
                if layer >= shape.layers:
                    raise RecipeError(
                        f"states {pair}: the {model} has no layer {layer}, only "
                        f"{numbers.counted(shape.layers, 'layer')}. Give a layer from 0 to {shape.layers - 1}."
                    )
            teacher_stage, student_stage = _stages(pair, teacher, student, topology)
            if teacher_stage != student_stage:
                raise RecipeError(_two_stages_message(pair, teacher, student, topology))


def _parsed(kind: str, written: str) -> LayerPair:
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(written))
    if not found:
        raise RecipeError(
            f"states {kind} has {written!r}, which is not a pair of layers. Write teacher:student in quotes: '29:13'."
        )
    return LayerPair(kind, int(found[1]), int(found[2]))


def _stages(pair: LayerPair, teacher: Shape, student: Shape, topology: Topology) -> tuple[int, int]:
    """Return the pipeline rank of the teacher's state and that of the student's."""
    layers = at_layer(pair.kind, pair.teacher, teacher), at_layer(pair.kind, pair.student, student)
    return topology.stage_of(layers[0], teacher.layers), topology.stage_of(layers[1], student.layers)


def _two_stages_message(pair: LayerPair, teacher: Shape, student: Shape, topology: Topology) -> str:
    """Return the error for a pair on two pipeline stages, with the nearest pair that is on one."""
    teacher_stage, student_stage = _stages(pair, teacher, student, topology)
    possible = _on_one_stage(pair.kind, teacher, student, topology)
    nearest = min(possible, key=lambda each: abs(each.teacher - pair.teacher) + abs(each.student - pair.student))
    return (
        f"states {pair}: the teacher's state is on pipeline stage {teacher_stage} and the student's on {student_stage} "
        f"(pp={topology.pp}, vp={topology.vp}). Use {nearest.teacher}:{nearest.student}, or a smaller pp."
    )


def _on_one_stage(kind: str, teacher: Shape, student: Shape, topology: Topology) -> Iterator[LayerPair]:
    """Yield the pairs whose two states are on the same pipeline stage."""
    for layers in product(range(teacher.layers), range(student.layers)):
        teacher_stage, student_stage = _stages(LayerPair(kind, *layers), teacher, student, topology)
        if teacher_stage == student_stage:
            yield LayerPair(kind, *layers)
