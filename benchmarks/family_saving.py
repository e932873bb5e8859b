"""FLOPs of a family, pretrained or pruned and distilled, for `docs/studies.md`: counted from shapes, not run.

    python benchmarks/family_saving.py

The family is `examples/presets/minitron.yaml`: 15B, 8B and 4B. Prints the table and writes its plot to
`docs/studies/family.png`.
"""

from __future__ import annotations

import sys
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from minitron_megatron.forecast import estimate_family  # noqa: E402
from minitron_megatron.forecast.family import PRETRAINING  # noqa: E402
from minitron_megatron.recipe import load_recipe  # noqa: E402
from minitron_megatron.report.plots.style import CHARTS, legend_outside, new_figure  # noqa: E402
from tests.forecast.test_presets import PRESETS, material_of  # noqa: E402

PLOT = ROOT / "docs" / "studies" / "family.png"


def main() -> None:
    with TemporaryDirectory() as folder:
        found = estimate_family(load_recipe(PRESETS / "minitron.yaml", material_of("minitron", Path(folder))))
    teacher = found.runs["8b"].teacher_parameters
    sizes = {"15B": teacher, **{name.upper(): found.runs[name].student_parameters for name in ("8b", "4b")}}
    first, *others = sizes
    cheap = {first: 1.0, **{name: sizes[name] / PRETRAINING / teacher for name in others}}
    ways = {
        "all pretrained": {name: size / teacher for name, size in sizes.items()},
        "8B and 4B distilled, as the paper counts": cheap,
        "the same, with the teacher's forward passes": {**cheap, "teacher's passes": len(others) / 3 / PRETRAINING},
    }
    whole = sum(ways["all pretrained"].values())
    print("| way | FLOPs over those of the 15B | all pretrained, over it |\n| --- | ---: | ---: |")
    for way, parts in ways.items():
        print(f"| {way} | {sum(parts.values()):.3f} | {whole / sum(parts.values()):.2f} |")
    for saving, parts in zip(found.saving, [*ways.values()][1:], strict=True):
        assert isclose(saving, whole / sum(parts.values()))
    with new_figure(PLOT, 8.5, 2.4) as figure:
        axes = figure.subplots()
        starts = [0.0] * len(ways)
        for name in [*sizes, "teacher's passes"]:
            widths = [parts.get(name, 0.0) for parts in ways.values()]
            axes.barh([*ways], widths, left=starts, label=name)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("FLOPs over those of pretraining the 15B (counted)")
        legend_outside(axes)
    PLOT.with_suffix(CHARTS).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
