"""Table of inference engines (clients) that cannot serve some students, for `estimate`, the model card and the guide.

`tests/compat/clients.sh` measures it, and `tests/serve/test_clients.py` compares it with the measurements.
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
    """A property of shapes that some clients do not support."""

    holds: Callable[[Shape], bool]
    name: Callable[[Shape], str]
    """Words that follow the architecture's name in a sentence, such as "with tied embeddings"."""
    advice: Callable[[Shape, Shape], str]
    """(student, teacher) -> advice to the user."""


@dataclass(frozen=True)
class Gap:
    """A client that fails on students of some families under a condition."""

    client: str
    families: tuple[str, ...]
    """`model_type`s in the export's config."""
    condition: Condition
    silent: bool = False
    """Whether the client gives wrong results without an error, at least at some sizes."""
    noted: bool = False
    """Whether the gap is a note rather than a warning: the guide does not serve with this client."""


def _filled(shape: Shape) -> int:
    return shape.heads * shape.head_dim


def _nearest(student: Shape, teacher: Shape) -> str:
    below = student.hidden // student.heads * student.heads
    return " or ".join(str(size) for size in (below, below + student.heads) if 0 < size <= teacher.hidden)


UNFILLED = Condition(
    lambda shape: shape.hidden != _filled(shape),
    lambda shape: f"with hidden size {shape.hidden}, which is not heads x head_dim ({shape.heads} x {shape.head_dim})",
    lambda student, teacher: (
        f"Choose hidden {_filled(student)}, or serve it with another client"
        if _filled(student) <= teacher.hidden
        else "Choose fewer heads, or serve it with another client"
    ),
)
NO_MULTIPLE = Condition(
    lambda shape: shape.hidden % shape.heads != 0,
    lambda shape: f"with hidden size {shape.hidden}, which is not a multiple of its {shape.heads} heads",
    lambda student, teacher: f"Choose hidden {_nearest(student, teacher)}, or load the export with transformers 4",
)
TIED = Condition(
    lambda shape: shape.tied,
    lambda shape: "with tied embeddings",
    lambda student, teacher: "Serve it with another client",
)

GAPS = (
    Gap("transformers 4", ("qwen2_moe",), UNFILLED),
    Gap("transformers 5", ("llama",), NO_MULTIPLE),
    Gap("OpenVINO", ("llama",), NO_MULTIPLE),
    Gap("TRL", ("llama",), NO_MULTIPLE),
    Gap("vLLM", ("llama",), NO_MULTIPLE),
    Gap("vLLM", ("qwen2", "qwen2_moe"), UNFILLED, silent=True),
    Gap("llama.cpp", ("qwen2", "qwen2_moe", "nemotron", "phi3"), UNFILLED),
    Gap("llama.cpp", ("qwen2_moe", "nemotron"), TIED),
    Gap("MLX-LM", ("qwen2", "qwen2_moe", "mixtral", "phi3"), UNFILLED),
    Gap("MLX-LM", ("qwen2_moe",), TIED),
    Gap("CTranslate2", ("llama", "qwen2"), UNFILLED, noted=True),
)
"""Families that a client does not support at all are not listed for it."""


def gaps(model_type: str, student: Shape) -> list[Gap]:
    """Return the gaps of clients that fail on an export."""
    return [gap for gap in GAPS if model_type in gap.families and gap.condition.holds(student)]


def client_warnings(teacher: ModelConfig, student: Shape, architecture: Architecture) -> tuple[str, ...]:
    """Return a warning for each property of an export that some client does not support.

    architecture: as `save_hf` takes it.
    """
    return tuple(_sentences(teacher, student, architecture, noted=False))


def client_notes(teacher: ModelConfig, student: Shape, architecture: Architecture) -> tuple[str, ...]:
    """Return the same for the clients that the guide does not serve with."""
    return tuple(_sentences(teacher, student, architecture, noted=True))


def _sentences(teacher: ModelConfig, student: Shape, architecture: Architecture, *, noted: bool) -> Iterator[str]:
    model_type = str(exported_config(replace(teacher, shape=student), architecture).source.get("model_type", "llama"))
    by_condition: dict[Condition, list[Gap]] = {}
    for gap in gaps(model_type, student):
        if gap.noted is noted:
            by_condition.setdefault(gap.condition, []).append(gap)
    for condition, matching in by_condition.items():
        loud, silent = ([gap.client for gap in matching if gap.silent is kind] for kind in (False, True))
        subject = f"a {model_type} {condition.name(student)}"
        sentences = [f"{_listed(loud)} refuse{'s' * (len(loud) == 1)} {subject}."] if loud else []
        if silent:
            gives = f"{_listed(silent)} give{'s' * (len(silent) == 1)} wrong results"
            sentences.append(f"{gives} for {'it' if loud else subject}, without an error.")
        yield " ".join([*sentences, _advice(condition, model_type, student, teacher)])


def _advice(condition: Condition, model_type: str, student: Shape, teacher: ModelConfig) -> str:
    if condition is not UNFILLED or model_type != "qwen2" or teacher.window is not None:
        return condition.advice(student, teacher.shape) + "."
    if student.hidden % student.heads == 0:
        return "Set `architecture` to auto, which writes a Llama that more clients can load."
    return f"Choose hidden {_nearest(student, teacher.shape)}, which is exported as a Llama that more clients can load."


def _listed(clients: list[str]) -> str:
    return f"{', '.join(clients[:-1])} and {clients[-1]}" if len(clients) > 1 else clients[0]
