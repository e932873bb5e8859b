"""Generate a starter recipe for a model, for the user to edit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import ceil, lcm
from pathlib import Path

from ..convert import local_folder, read_config
from ..errors import MinitronError
from ..layout import Shape
from ..model import ModelConfig, check_fits
from ..parallel import Topology
from ..prune import checked_sizes
from ..serve import client_warnings
from .training_keys import Correct, Distill

__all__ = ["starter_recipe"]

TOKENS = 1_000_000_000
TEMPLATE = """\
# A starter recipe for {model}: {parameters}.
# `minitron schema` explains every key; omitted keys have the papers' values.
model: {model}{tokenizer}
out: {out}

data:
  sequence: {sequence}
  sources:
    - path: data/corpus.jsonl   # one {{"text": ...}} per line, or a .txt file, or a folder of such files
      validation: 0.01          # share of the documents to hold out

correct:                        # teacher correction; remove it if the teacher was trained on this corpus
  tokens: 1.0e9
  lr: 6.0e-5                    # a fifth of the teacher's own peak learning rate
  warmup_steps: {correct_warmup}

prune:                          # about half the size, in the proportions of Llama-3.1-Minitron-4B
{prune}

distill:
  tokens: 1.0e9                 # the papers: 94e9
  warmup_steps: {distill_warmup}

parallel: {{tp: 1, pp: 1}}
"""

SHARES = {"hidden": 3 / 4, "ffn": 9 / 14, "expert_ffn": 9 / 14, "shared_ffn": 9 / 14}
"""Axis -> share of it that is kept."""
UNITS, WIDE = (256, 128, 64, 32, 16, 8, 4, 2, 1), 1024
"""Sizes are multiples of the first of these units that works (large multiples run faster). A model with a hidden size
below WIDE begins at 16."""


def starter_recipe(model: Path, tokenizer: Path | None = None) -> str:
    """Return YAML text: hidden cut to about 3/4 and MLPs to about 9/14 of their size, to sizes that pass all checks.

    tokenizer: Hugging Face folder with the tokenizer of a Megatron checkpoint.
    """
    config = read_config(local_folder(model, tokenizer))
    shape, sequence = config.shape, min(8192, config.longest)
    steps = ceil(TOKENS / (Distill().global_batch * sequence))
    sizes = _sizes(config)
    return TEMPLATE.format(
        model=_quoted(str(model)),
        tokenizer=f"\ntokenizer: {_quoted(str(tokenizer))}" if tokenizer else "",
        out=_quoted(str(_out(model))),
        parameters=f"{shape.layers} layers, hidden {shape.hidden}, ffn {shape.ffn or shape.expert_ffn}, "
        f"{shape.heads} heads",
        sequence=sequence,
        prune="\n".join(f"  {axis}: {size}" for axis, size in sizes.items()),
        correct_warmup=min(Correct().warmup_steps, steps // 10),
        distill_warmup=min(Distill().warmup_steps, steps // 10),
    )


def _sizes(config: ModelConfig) -> dict[str, int]:
    teacher = config.shape
    for sizes in _candidates(teacher):
        try:
            student = teacher.resized(**checked_sizes(teacher, sizes))
            check_fits(student, Topology())
        except MinitronError:
            continue
        if not client_warnings(config, student, "auto"):
            return sizes
    return {axis: teacher.axis_size(axis) for axis in ("ffn", "expert_ffn") if teacher.axis_size(axis)}


def _candidates(teacher: Shape) -> Iterator[dict[str, int]]:
    """Yield the sizes nearest to the papers' shares, on coarser grids first.

    Variants of hidden: any multiple of the unit, a multiple of the heads, heads x head_dim with fewer heads, or uncut.
    """
    cut = [axis for axis in SHARES if teacher.axis_size(axis) > 1]
    units = UNITS if teacher.hidden >= WIDE else UNITS[UNITS.index(16) :]
    for unit in units:
        near = {axis: _near(teacher.axis_size(axis), SHARES[axis], unit) for axis in cut}
        if not all(near.values()):
            continue
        yield near
        if by_heads := _near(teacher.hidden, SHARES["hidden"], lcm(unit, teacher.heads)):
            yield near | {"hidden": by_heads}
    for unit in units:
        near = {axis: _near(teacher.axis_size(axis), SHARES[axis], unit) for axis in cut if axis != "hidden"}
        if not all(near.values()):
            continue
        heads = _near(teacher.heads, SHARES["hidden"], teacher.kv_groups)
        if heads and teacher.hidden == teacher.heads * teacher.head_dim:
            yield {"hidden": heads * teacher.head_dim, **near, "heads": heads}
        yield near


def _near(size: int, share: float, unit: int) -> int:
    """Return the multiple of `unit` nearest to `share` of `size` and below `size`; 0 if there is none."""
    near = round(size * share / unit) * unit
    return near if 0 < near < size else 0


def _out(model: Path) -> Path:
    """Return a run folder that is not inside the model's folder."""
    folder = Path("runs") / model.resolve().name.partition("@")[0]
    return folder if model.resolve() not in folder.resolve().parents else model.resolve().parent / folder


def _quoted(text: str) -> str:
    """Return text as a YAML scalar on one line; a JSON string is one."""
    plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text, re.ASCII) and text.lower() not in ("null", "true", "yes", "on")
    plain = plain and text.lower() not in ("false", "no", "off", "y", "n")
    return text if plain else json.dumps(text, ensure_ascii=False)
