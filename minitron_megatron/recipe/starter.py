"""A first recipe for somebody's model, to be edited."""

from __future__ import annotations

from pathlib import Path

from ..convert import read_config

__all__ = ["starter_recipe"]

TEMPLATE = """\
# A starter recipe for {model}: {parameters}.
# `minitron schema` explains every key; what is left out has the papers' value.
model: {model}
out: runs/{name}

data:
  sequence: {sequence}
  sources:
    - path: data/corpus.jsonl   # one {{"text": ...}} a line, or .txt, or a folder of them
      validation: 0.01          # share of the documents to hold out

correct:                        # teacher correction; remove it where the corpus is the teacher's own
  tokens: 1.0e9
  lr: 6.0e-5                    # a fifth of the teacher's own peak learning rate

prune:                          # about half the size, in the proportions of Llama-3.1-Minitron-4B
  hidden: {hidden}
  ffn: {ffn}

distill:
  tokens: 1.0e9                 # the papers: 94e9

parallel: {{tp: 1, pp: 1}}
"""


def starter_recipe(model: Path) -> str:
    """YAML text: widths cut to three quarters and nine fourteenths, rounded to what hardware likes."""
    shape = read_config(model).shape
    return TEMPLATE.format(
        model=model,
        name=model.name,
        parameters=f"{shape.layers} layers, hidden {shape.hidden}, ffn {shape.ffn}, {shape.heads} heads",
        sequence=min(8192, read_config(model).max_positions),
        hidden=_near(shape.hidden * 3 / 4),
        ffn=_near(shape.ffn * 9 / 14),
    )


def _near(size: float) -> int:
    """The nearest multiple of 256, or of 16 for a small model."""
    unit = 256 if size >= 1024 else 16
    return max(unit, round(size / unit) * unit)
