"""Repeatedly killed runs compared with an uninterrupted one.

    make soak

The quickstart's recipe with shorter budgets and a checkpoint every few steps is killed (kill -9, all its processes) at
random moments and started again until it ends, in as many runs as twenty kills take. Required: the same table except
for times, the same weights, every checkpoint readable, and no step before the last complete checkpoint repeated.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from record import record

KILLS, SEED = 20, 1
ROOT = Path(__file__).resolve().parents[1]
SHORT = {
    "correct.tokens": 24 * 16 * 128,
    "correct.save_every": 3,
    "distill.tokens": 48 * 16 * 128,
    "distill.save_every": 3,
    "random_baseline": "false",
}


def start(out: Path, verb: str = "run", keys: Mapping[str, Any] = SHORT) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "minitron_megatron", verb, "examples/quickstart/recipe.yaml", "--out", str(out)]
    for key, value in keys.items():
        command += ["--set", f"{key}={value}"]
    log = (out.parent / f"{out.name}.log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def table(out: Path) -> list[dict[str, Any]]:
    rows = json.loads((out / "summary.json").read_text())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def digest(out: Path) -> str:
    return str(json.loads((out / "stages" / "distill.json").read_text())["result"]["hash"])


def steps(out: Path) -> list[tuple[str, int]]:
    """Return (stage, step) in the order in which they were done."""
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(line["stage"], line["done"]) for line in lines if "lr" in line]


Start = Callable[[Path], "subprocess.Popen[bytes]"]


def killed_until_done(out: Path, draw: random.Random, seconds: float, kills: int, begin: Start = start) -> int:
    """Run to the end, with up to `kills` kills at random moments; return how many there were."""
    done = 0
    while True:
        process = begin(out)
        try:
            code = process.wait(draw.uniform(0.05, 0.25) * seconds if done < kills else None)
            assert code == 0, f"see {out}.log"
            return done
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1


def main() -> None:
    where = ROOT / "runs" / "soak"
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    began, whole = time.perf_counter(), where / "whole"
    assert start(whole).wait() == 0, f"see {whole}.log"
    seconds, draw, kills, runs = time.perf_counter() - began, random.Random(SEED), 0, list[Path]()
    while kills < KILLS:
        runs.append(where / f"killed{len(runs)}")
        kills += killed_until_done(runs[-1], draw, seconds, KILLS - kills)
    done = [steps(run) for run in runs]
    record(
        "soak",
        seed=SEED,
        kills=kills,
        runs=len(runs),
        same_table=all(table(run) == table(whole) for run in runs),
        same_weights=all(digest(run) == digest(whole) for run in runs),
        spoilt_checkpoints=sum(
            Path(f"{run}.log").read_text(errors="replace").count("Resuming from step_") for run in runs
        ),
        steps=sum(len(set(each)) for each in done),
        steps_done_again=sum(len(each) - len(set(each)) for each in done),
        interval=SHORT["distill.save_every"],
    )


if __name__ == "__main__":
    main()
