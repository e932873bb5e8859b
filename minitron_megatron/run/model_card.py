"""Model card of an export: shape, training, evaluation and origin of the student."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..convert import read_config
from ..files import whole_file
from ..forecast import model_origins
from ..layout import SIZED_AXES, Shape, parameters
from ..model import ModelConfig
from ..recipe import with_keys
from ..records import read_summary
from ..serve import client_notes, client_warnings
from .context import Context
from .versions import versions

__all__ = ["write_card"]

MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=:)//")
"""Characters with a meaning inside a Markdown line; an underscore within a word has none."""


class _OneLine(yaml.SafeDumper):
    """YAML dumper that writes every string on one line, so that no line of it can end a front matter or code block."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_OneLine.add_representer(str, _quoted)


def write_card(context: Context, folder: Path) -> None:
    """Write `README.md` into the export, on rank 0: Hugging Face's metadata, then prose and tables."""
    if context.topology.rank != 0:
        return
    with whole_file(folder / "README.md") as partial:
        partial.write_text(_card(context, folder), encoding="utf-8")


def _card(context: Context, folder: Path) -> str:
    recipe, done = context.recipe, context.done
    exported, teacher = read_config(folder), read_config(recipe.model).shape
    student = exported.shape
    tags = ["minitron", *([] if recipe.student else ["pruned"]), "distilled", *(["aligned"] if recipe.align else [])]
    base, made, how = _making(context)
    about = {"base_model": base, "library_name": "transformers", "tags": tags}
    private: dict[str, Any] = {
        "model": True,
        "student": True,
        "out": True,
        "data": {"sources"},
        "score": {"sources"},
        "align": {"__all__": {"sources", "pairs", "validation"}},
    }
    keys = recipe.model_dump(mode="json", exclude_none=True, exclude=private)
    shapes = [(axis, getattr(teacher, axis), getattr(student, axis)) for axis in SIZED_AXES if getattr(teacher, axis)]
    sources = [(name, source["tokens"], source["weight"]) for name, source in done["prepare"]["sources"].items()]
    training = [(stage, f"{done[stage]['tokens']:,} tokens", "") for stage in ("correct", "distill") if stage in done]
    training += _rounds(context)
    parts = [
        f"---\n{_yaml(about)}---\n",
        f"# {_inline(folder.resolve().parent.name)}: {_inline(made)}\n",
        f"{parameters(student):,} parameters, of the teacher's {parameters(teacher):,}. {how}\n",
        _table(("", "teacher", "student"), [*shapes, ("parameters", parameters(teacher), parameters(student))]),
        _clients(exported, student if recipe.student else teacher),
        "## Training\n",
        _table(("stage", "length", "data"), training),
        _table(("source", "tokens", "weight"), sources),
        _repair(context),
        "## Evaluation\n",
        _evaluation(context),
        "## Licence\n",
        "This model is derived from its teacher, whose licence applies. Read it before you distribute this model.\n",
        "## Recipe and versions\n",
        _fenced(_yaml(keys)),
        _table(("package", "version"), list(versions().items())),
    ]
    return "\n".join(part for part in parts if part)


def _rounds(context: Context) -> list[tuple[str, str, str]]:
    """Return stage, length and data of each round of alignment."""
    rounds = {f"align-{number}": keys for number, keys in enumerate(context.recipe.align, 1)}
    return [
        (
            f"{stage}: {keys.method}, {keys.loss}",
            f"{context.done[stage]['units']:,} {keys.unit}",
            ", ".join(Path(path).stem for path in keys.paths),
        )
        for stage, keys in rounds.items()
    ]


def _making(context: Context) -> tuple[str, str, str]:
    """Return the name of the model whose weights the export began with, a title, and how it was made."""
    teacher, student = _name(context, "model", context.recipe.model), context.recipe.student
    keys = context.recipe.distill
    trained = "distilled" if keys.has_teacher else "trained"
    source = "from its logits" if keys.has_teacher else f"without it ({keys.objective})"
    if student is None:
        how = "Made by the Minitron method: the least important parts of the teacher were pruned, and the rest was "
        return teacher, f"{teacher} pruned and {trained}", f"{how}{trained} {source}."
    base = _name(context, "student", student)
    if not keys.has_teacher:
        return base, f"{base} trained", f"Trained without a teacher ({keys.objective}); nothing was pruned."
    return base, f"{base} distilled from {teacher}", "Distilled from the teacher's logits; nothing was pruned."


def _name(context: Context, key: str, folder: Path) -> str:
    """Return the name of a model of the recipe: its name on the Hub, or that of its folder."""
    origin = model_origins(context.recipe).get(key)
    if origin is None:
        return folder.name
    return origin["place"].partition("@")[0] if "commit" in origin else Path(origin["place"]).name


def _clients(exported: ModelConfig, teacher: Shape) -> str:
    """Return a section on the clients that cannot serve the export."""
    original, student = replace(exported, shape=teacher), exported.shape
    sentences = (*client_warnings(original, student, "own"), *client_notes(original, student, "own"))
    return "## Clients\n\n" + "".join(f"* {with_keys(sentence)}\n" for sentence in sentences) if sentences else ""


def _repair(context: Context) -> str:
    """Return a sentence on the refit; empty if there was none."""
    refit = context.done.get("prune", {}).get("refit")
    if not refit:
        return ""
    return (
        f"Before distillation {refit['repaired']} of {refit['layers']} linear layers of the cut model were refitted to "
        f"the teacher's activations by least squares ({refit['method']}), on {refit['tokens']:,} calibration tokens.\n"
    )


def _evaluation(context: Context) -> str:
    rows = read_summary(context.folders.summary)
    tasks = list(dict.fromkeys(name for row in rows for name in row.get("tasks", {})))
    titles = ("model", "parameters", "loss (nats/token)", "perplexity", *tasks)
    cells = [
        (
            row["model"],
            _formatted(row.get("parameters"), ",d"),
            _formatted(row.get("loss_nats_per_token"), ".4f"),
            _formatted(row.get("perplexity"), ".2f"),
            *(_formatted(row.get("tasks", {}).get(name), ".4f") for name in tasks),
        )
        for row in rows
    ]
    return _table(titles, cells)


def _yaml(value: object) -> str:
    return yaml.dump(value, Dumper=_OneLine, sort_keys=False, width=float("inf"))


def _fenced(body: str) -> str:
    """Return a code block whose fence is longer than any run of backticks inside it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
    return f"{fence}yaml\n{body}{fence}\n"


def _inline(text: str) -> str:
    """Return text from a recipe or a path as one line that Markdown and HTML show as it is."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return MARKUP.sub(lambda found: "".join(f"&#{ord(letter)};" for letter in found[0]), html.escape(line, quote=False))


def _formatted(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    text = [[f"{cell:,}" if isinstance(cell, int) else _inline(str(cell)) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in text) if len(lines) > 2 else ""
