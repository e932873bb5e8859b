"""Results of finished studies: a record of each, its plot for the documentation, and its table in Markdown.

    python benchmarks/study_results.py runs/studies-studies losses width-depth

Appends each study's `table.json` to `results/studies.jsonl`, writes its plot to `docs/studies/NAME.png` in 256 colours,
and prints the table and the link to the plot as `docs/studies.md` has them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image
from record import record

from minitron_megatron.files import read_json

PLOTS = Path(__file__).parents[1] / "docs" / "studies"


def table(found: dict[str, Any]) -> str:
    """An arm a row; of each measure the mean with its spread, and the difference from the first arm with its seeds."""
    arms, several = found["arms"], len(found["measures"]) > 1
    heads = ["arm"]
    for name in found["measures"]:
        of = f"{name}: " if several else ""
        heads += [f"{of}mean (spread)", f"{of}difference", "better : worse"]
        if _printed(found, name):
            heads.append("the paper's")
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for arm in arms:
        row = [arm["arm"]]
        for name in found["measures"]:
            row += _cells(arm["measures"].get(name), printed=_printed(found, name))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _printed(found: dict[str, Any], name: str) -> bool:
    return any((arm["measures"].get(name) or {}).get("printed") is not None for arm in found["arms"])


def _cells(of: dict[str, Any] | None, *, printed: bool) -> list[str]:
    if of is None or of["mean"] is None:
        return [""] * (4 if printed else 3)
    cells = [f"{of['mean']:.3f} ({of['spread']:.3f})", "", ""]
    if of["difference"] is not None:
        cells[1:] = [f"{of['difference']:+.3f}", "{} : {}".format(*of["signs"])]
    if printed:
        cells.append("" if of["printed"] is None else f"{of['printed']:g}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="Records, plots and tables of finished studies.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("studies", nargs="+")
    args = parser.parse_args()
    PLOTS.mkdir(exist_ok=True)
    for name in args.studies:
        found = read_json(args.folder / name / "table.json")
        record("studies", **found)
        image = (
            Image.open(args.folder / name / "table.png")
            .convert("RGB")
            .quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        )
        image.save(PLOTS / f"{name}.png", optimize=True)
        print(f"\n{table(found)}\n\n![{found['title']}](studies/{name}.png)\n")


if __name__ == "__main__":
    main()
