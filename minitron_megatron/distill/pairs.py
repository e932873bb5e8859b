"""Which hidden states of the student are to be like which of the teacher's, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from typing import NamedTuple

from ..errors import RecipeError, did_you_mean
from ..layout import Shape
from ..losses import STATE_LOSSES
from ..parallel import Topology

__all__ = ["ATTENTION", "MLP_INPUTS", "OUTPUTS", "LayerPair", "StatePairs"]

OUTPUTS, MLP_INPUTS, ATTENTION = "outputs", "mlp_inputs", "attention"

DYNAMIC = "dynamic"


class LayerPair(NamedTuple):
    """A state of the teacher and one of the student. The embedding is the output of layer -1."""

    kind: str
    teacher: int
    """Its layer, from 0."""
    student: int

    def __str__(self) -> str:
        return "embedding" if self.teacher < 0 else f"{self.kind} {self.teacher}:{self.student}"


def at_layer(kind: str, layer: int, shape: Shape) -> int:
    """The layer whose pipeline stage has a state: an output is measured after the norm that follows it."""
    return min(layer + 1, shape.layers - 1) if kind == OUTPUTS else layer


@dataclass(frozen=True)
class StatePairs:
    """Which states are compared, how, and what that weighs beside the divergence of the logits.

    Layers are written `teacher:student`, each numbered from 0 in its own model. Raises RecipeError for what is not.
    """

    embedding: bool = False
    """L_emb: the embedding after the first norm."""
    outputs: tuple[str, ...] = ()
    """L_o: outputs of layers, after the norm that follows."""
    mlp_inputs: tuple[str, ...] = ()
    """L_i: what enters MLPs, after the norm before them."""
    attention: tuple[str, ...] = ()
    """L_att: relations between tokens by their queries, their keys and their values (MiniLMv2)."""
    loss: str = "cosine"
    """A name in STATE_LOSSES, for all but `attention`."""
    alpha: float | str = DYNAMIC
    """Weight of the mean over the pairs; `dynamic`: see `StateLoss`."""

    def __post_init__(self) -> None:
        if self.loss not in STATE_LOSSES:
            known = ", ".join(STATE_LOSSES)
            raise RecipeError(
                f"loss of states {self.loss!r} is not known.{did_you_mean(self.loss, STATE_LOSSES)} Known: {known}."
            )
        if self.alpha != DYNAMIC and (isinstance(self.alpha, str | bool) or not 0 < self.alpha < math.inf):
            raise RecipeError(f"alpha of the states is {self.alpha!r}. It must be above 0, or {DYNAMIC}.")
        if not self.pairs:
            kinds = ", ".join(field.name for field in fields(self)[:4])
            raise RecipeError(f"no states are mapped. Set at least one of {kinds}.")

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
        """Raises RecipeError for a layer that is not there, for a pair that lies on two pipeline stages, and for
        relations between tokens where ranks share sequences."""
        if topology.cp > 1 and any(pair.kind == ATTENTION for pair in self.pairs):
            raise RecipeError(
                f"states {ATTENTION} relates all tokens of a sequence, and cp={topology.cp}. Set cp to 1."
            )
        for pair in self.pairs:
            for whose, layer, shape in (("teacher", pair.teacher, teacher), ("student", pair.student, student)):
                if layer >= shape.layers:
                    raise RecipeError(
                        f"states {pair} asks for layer {layer} of the {whose}, which has {shape.layers}. "
                        f"Give one of 0 to {shape.layers - 1}."
                    )
            theirs, ours = _stages(pair, teacher, student, topology)
            if theirs != ours:
                raise RecipeError(_of_two_stages(pair, teacher, student, topology))


def _parsed(kind: str, written: str) -> LayerPair:
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(written))
    if not found:
        raise RecipeError(
            f"states {kind} has {written!r}, which is no pair of layers. Write teacher:student in quotes, as '29:13'."
        )
    return LayerPair(kind, int(found[1]), int(found[2]))


def _stages(pair: LayerPair, teacher: Shape, student: Shape, topology: Topology) -> tuple[int, int]:
    """The pipeline rank of the teacher's state, and of the student's."""
    layers = at_layer(pair.kind, pair.teacher, teacher), at_layer(pair.kind, pair.student, student)
    return topology.stage_of(layers[0], teacher.layers), topology.stage_of(layers[1], student.layers)


def _of_two_stages(pair: LayerPair, teacher: Shape, student: Shape, topology: Topology) -> str:
    """What is wrong, and the mapping that is nearest to the one asked for."""
    theirs, ours = _stages(pair, teacher, student, topology)
    there = _on_one_stage(pair.kind, teacher, student, topology)
    nearest = min(there, key=lambda each: abs(each.teacher - pair.teacher) + abs(each.student - pair.student))
    return (
        f"states {pair} lies on two pipeline stages: the teacher's on {theirs} and the student's on {ours} "
        f"(pp={topology.pp}, vp={topology.vp}). Map {nearest.teacher}:{nearest.student}, or lower pp."
    )


def _on_one_stage(kind: str, teacher: Shape, student: Shape, topology: Topology) -> Iterator[LayerPair]:
    for layers in product(range(teacher.layers), range(student.layers)):
        theirs, ours = _stages(LayerPair(kind, *layers), teacher, student, topology)
        if theirs == ours:
            yield LayerPair(kind, *layers)
