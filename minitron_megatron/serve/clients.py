"""Clients that cannot serve some students: one table, told by `estimate`, the model card and the guide.

`tests/compat/clients.sh` measured it, and `tests/serve/test_clients.py` holds it to what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..convert import Architecture, exported_config
from ..layout import Shape
from ..model import ModelConfig

__all__ = ["Gap", "client_notes", "client_warnings", "gaps"]


@dataclass(frozen=True)
class Condition:
    """A property of shapes that some clients do not expect."""

    holds: Callable[[Shape], bool]
    name: Callable[[Shape], str]
    """The student, as the subject of a sentence."""
    advice: Callable[[Shape, Shape], str]
    """(student, teacher) -> what to do instead."""


@dataclass(frozen=True)
class Gap:
    """A client that does not read students of some families as what they are."""

    client: str
    families: tuple[str, ...]
    """Their `model_type` in the export."""
    condition: Condition
    silent: bool = False
    """Whether it gives other results without an error, at some sizes at least."""
    noted: bool = False
    """Whether it stands in notes alone: the client is none that the guide serves with."""


def _filled(shape: Shape) -> int:
    return shape.heads * shape.head_dim


def _nearest(student: Shape, teacher: Shape) -> str:
    below = student.hidden // student.heads * student.heads
    return " or ".join(str(size) for size in (below, below + student.heads) if 0 < size <= teacher.hidden)


UNFILLED = Condition(
    lambda shape: shape.hidden != _filled(shape),
    lambda shape: f"of hidden size {shape.hidden}, which is not heads x head_dim ({shape.heads} x {shape.head_dim})",
    lambda student, teacher: (
        f"Choose hidden {_filled(student)}, or serve it with another client"
        if _filled(student) <= teacher.hidden
        else "Choose fewer heads, or serve it with another client"
    ),
)
NO_MULTIPLE = Condition(
    lambda shape: shape.hidden % shape.heads != 0,
    lambda shape: f"of hidden size {shape.hidden} with {shape.heads} heads: it wants a multiple",
    lambda student, teacher: f"Choose hidden {_nearest(student, teacher)}, or load the export with transformers 4",
)
TIED = Condition(
    lambda shape: shape.tied,
    lambda shape: "whose embeddings are tied",
    lambda student, teacher: "Serve it with another client",
)

GAPS = (
    Gap("transformers 5", ("llama",), NO_MULTIPLE),
    Gap("vLLM", ("llama",), NO_MULTIPLE),
    Gap("vLLM", ("qwen2", "qwen2_moe"), UNFILLED, silent=True),
    Gap("llama.cpp", ("qwen2", "qwen2_moe", "nemotron", "phi3"), UNFILLED),
    Gap("llama.cpp", ("qwen2_moe", "nemotron"), TIED),
    Gap("MLX-LM", ("qwen2", "qwen2_moe", "mixtral", "phi3"), UNFILLED),
    Gap("MLX-LM", ("qwen2_moe",), TIED),
    Gap("CTranslate2", ("llama", "qwen2"), UNFILLED, noted=True),
)
"""Families that a client reads in no shape are none of its."""


def gaps(model_type: str, student: Shape) -> list[Gap]:
    """The clients that fail on an export."""
    return [gap for gap in GAPS if model_type in gap.families and gap.condition.holds(student)]


def client_warnings(teacher: ModelConfig, student: Shape, architecture: Architecture) -> tuple[str, ...]:
    """Sentences on each property of an export that some client does not expect.

    architecture: the recipe's `export.architecture`.
    """
    return tuple(_sentences(teacher, student, architecture, noted=False))


def client_notes(teacher: ModelConfig, student: Shape, architecture: Architecture) -> tuple[str, ...]:
    """The same, of the clients that the guide does not serve with."""
    return tuple(_sentences(teacher, student, architecture, noted=True))


def _sentences(teacher: ModelConfig, student: Shape, architecture: Architecture, *, noted: bool) -> Iterator[str]:
    model_type = str(exported_config(replace(teacher, shape=student), architecture).source.get("model_type", "llama"))
    by_condition: dict[Condition, list[Gap]] = {}
    for gap in gaps(model_type, student):
        if gap.noted is noted:
            by_condition.setdefault(gap.condition, []).append(gap)
    for condition, those in by_condition.items():
        loud, silent = ([gap.client for gap in those if gap.silent is kind] for kind in (False, True))
        what = f"a {model_type} {condition.name(student)}"
        said = [f"{_listed(loud)} refuse{'s' * (len(loud) == 1)} {what}."] if loud else []
        if silent:
            gives = f"{_listed(silent)} give{'s' * (len(silent) == 1)} wrong results"
            said.append(f"{gives} from {'it' if loud else what}, without an error.")
        yield " ".join([*said, _advice(condition, model_type, student, teacher)])


def _advice(condition: Condition, model_type: str, student: Shape, teacher: ModelConfig) -> str:
    if condition is not UNFILLED or model_type != "qwen2" or teacher.window is not None:
        return condition.advice(student, teacher.shape) + "."
    if student.hidden % student.heads == 0:
        return "Set export.architecture to auto, which writes a Llama that more clients read."
    return f"Choose hidden {_nearest(student, teacher.shape)}, which is exported as a Llama that more clients read."


def _listed(clients: list[str]) -> str:
    return f"{', '.join(clients[:-1])} and {clients[-1]}" if len(clients) > 1 else clients[0]
