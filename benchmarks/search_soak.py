"""Repeatedly killed searches compared with an uninterrupted one.

    python benchmarks/search_soak.py

Needs `make runs/corpus`. A small search with the quickstart's teacher is killed (kill -9) at random moments and started
again, in as many searches as ten kills take. The table must be the same.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

from record import record
from soak import ROOT, killed_until_done, start

KILLS, SEED = 10, 1
KEYS = {
    "correct": "null",
    "prune": "{}",
    "score.samples": 16,
    "search": "{layers: [6, 7], hidden: [144, 160], ffn: [320, 384], heads: [4, 8], budget: {params: 2.2e6}, "
    "light: {top: 3, tokens: 24576, measure_every: 3, halvings: 1}}",
}


def begin(out: Path):  # type: ignore[no-untyped-def]
    return start(out, "search", KEYS)


def main() -> None:
    where = ROOT / "runs" / "search-soak"
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    for stage in ("prepare", "score"):
        assert start(where / "begun", stage, KEYS).wait() == 0
    whole = where / "whole"
    shutil.copytree(where / "begun", whole)
    began = time.perf_counter()
    assert begin(whole).wait() == 0, f"see {whole}.log"
    seconds, draw, kills, searches = time.perf_counter() - began, random.Random(SEED), 0, list[Path]()
    while kills < KILLS:
        searches.append(where / f"killed{len(searches)}")
        shutil.copytree(where / "begun", searches[-1])
        kills += killed_until_done(searches[-1], draw, 2 * seconds, KILLS - kills, begin)
    tables = [json.loads((out / "search" / "table.json").read_text()) for out in (whole, *searches)]
    record(
        "search_soak",
        seed=SEED,
        kills=kills,
        searches=len(searches),
        candidates=len(tables[0]["candidates"]),
        same_table=all(table == tables[0] for table in tables),
    )


if __name__ == "__main__":
    main()
