"""FLOPs of a family, pretrained or pruned and distilled, for `docs/studies.md`: counted from shapes, not run.

    python benchmarks/family_saving.py

The family is `examples/presets/minitron.yaml`: 15B, 8B and 4B. Prints the table and writes its plot to
`docs/studies/family.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from pytest import approx  # noqa: E402

from minitron_megatron.forecast import estimate_family  # noqa: E402
from minitron_megatron.recipe import load_recipe  # noqa: E402
from minitron_megatron.report.plots.style import CHARTS, legend_outside, new_figure  # noqa: E402
from tests.forecast.test_presets import PRESETS, material_of  # noqa: E402

PLOT = ROOT / "docs" / "studies" / "family.png"
TOKENS = 40
"""Tokens of pretraining over those of distillation ([A] 4.4)."""


def main() -> None:
    with TemporaryDirectory() as folder:
        found = estimate_family(load_recipe(PRESETS / "minitron.yaml", material_of("minitron", Path(folder))))
    teacher = found.runs["8b"].teacher_parameters
    sizes = {"15B": teacher, **{name.upper(): found.runs[name].student_parameters for name in ("8b", "4b")}}
    first, *others = sizes
    cheap = {first: 1.0, **{name: sizes[name] / TOKENS / teacher for name in others}}
    ways = {
        "all pretrained": {name: size / teacher for name, size in sizes.items()},
        "8B and 4B distilled, as the paper counts": cheap,
        "the same, with the teacher's forward passes": {**cheap, "teacher's passes": len(others) / 3 / TOKENS},
    }
    whole = sum(ways["all pretrained"].values())
    print("| way | FLOPs over those of the 15B | all pretrained, over it |\n| --- | ---: | ---: |")
    for way, parts in ways.items():
        print(f"| {way} | {sum(parts.values()):.3f} | {whole / sum(parts.values()):.2f} |")
    assert found.saving == approx([whole / sum(parts.values()) for parts in [*ways.values()][1:]])
    with new_figure(PLOT, 8.5, 2.4) as figure:
        axes = figure.subplots()
        for name in [*sizes, "teacher's passes"]:
            starts = [sum(part for other, part in parts.items() if _before(other, name)) for parts in ways.values()]
            axes.barh([*ways], [parts.get(name, 0) for parts in ways.values()], left=starts, label=name)
        axes.invert_yaxis()
        axes.set_xlabel("FLOPs over those of pretraining the 15B (counted)")
        legend_outside(axes)
    PLOT.with_suffix(CHARTS).unlink(missing_ok=True)


def _before(other: str, name: str) -> bool:
    order = ["15B", "8B", "4B", "teacher's passes"]
    return order.index(other) < order.index(name)


if __name__ == "__main__":
    main()
