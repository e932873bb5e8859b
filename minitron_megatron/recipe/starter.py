"""A first recipe for somebody's model, to be edited."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import ceil, lcm
from pathlib import Path

from ..convert import read_config
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
# `minitron schema` explains every key; what is left out has the papers' value.
model: {model}
out: {out}

data:
  sequence: {sequence}
  sources:
    - path: data/corpus.jsonl   # one {{"text": ...}} a line, or .txt, or a folder of them
      validation: 0.01          # share of the documents to hold out

correct:                        # teacher correction; remove it where the corpus is the teacher's own
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
"""Axis -> what of it stays."""
UNITS, WIDE = (256, 128, 64, 32, 16, 8, 4, 2, 1), 1024
"""Sizes are multiples of the first of these that works, since hardware likes large ones; below WIDE from 16 on."""


def starter_recipe(model: Path) -> str:
    """Return YAML text: widths cut to three quarters and nine fourteenths, to sizes that every check lets through."""
    config = read_config(model)
    shape, sequence = config.shape, min(8192, config.longest)
    steps = ceil(TOKENS / (Distill().global_batch * sequence))
    sizes = _sizes(config)
    return TEMPLATE.format(
        model=_quoted(str(model)),
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
    """The sizes nearest to the papers' shares, on coarser grids first; hidden also as a multiple of the heads, as the
    whole of them with fewer heads, or left whole."""
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
    """The multiple of `unit` nearest to that share of a size, less than all of it; 0 where there is none."""
    near = round(size * share / unit) * unit
    return near if 0 < near < size else 0


def _out(model: Path) -> Path:
    """A run folder that does not lie in the model's."""
    here = Path("runs") / model.resolve().name
    return here if model.resolve() not in here.resolve().parents else model.resolve().parent / here


def _quoted(text: str) -> str:
    """A YAML scalar on one line: JSON's strings are such."""
    plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text, re.ASCII) and text.lower() not in ("null", "true", "yes", "on")
    plain = plain and text.lower() not in ("false", "no", "off", "y", "n")
    return text if plain else json.dumps(text, ensure_ascii=False)
