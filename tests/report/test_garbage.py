"""Fuzzing: for any contents of a run's files, their readers return the valid part or one error that names the file."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minitron_megatron.errors import MinitronError
from minitron_megatron.forecast.candidates import speed_rows
from minitron_megatron.layout import Shape
from minitron_megatron.records import DepthScores, Plan
from minitron_megatron.report import describe, page, report_run, watch

SHAPE = Shape(layers=3, hidden=8, ffn=6, heads=4, kv_groups=2, head_dim=2, vocab=11)
LEAVES = [
    None,
    True,
    0,
    -1,
    3,
    2**70,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "[/x]",
    "1",
    [],
    {},
    [[]],
    {"a": 1},
]
TRIES = 30


def spoilt(whole: Any, chance: random.Random) -> Any:
    """Draw a JSON value with something changed or removed."""
    if not isinstance(whole, dict | list) or not whole or chance.random() < 0.2:
        return chance.choice(LEAVES)
    key, copy = chance.choice(list(whole) if isinstance(whole, dict) else range(len(whole))), whole.copy()
    if chance.random() < 0.2:
        del copy[key]
    else:
        copy[key] = spoilt(whole[key], chance)
    return copy


def plan(path: Path) -> None:
    Plan(SHAPE, {"hidden": {None: (0, 1)}, "heads": {0: (0, 2), 2: (1, 3)}}, (0, 2), {"hidden": {None: 0.1}}).save(path)


def depth(path: Path) -> None:
    DepthScores(SHAPE, "loss", True, 1.0, {(0, 1): 2.0, (1, 1): 3.0}, ((0, 2.0),)).save(path)


def written(value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(value)) and None


ROWS = [
    {"model": "a", "parameters": 3, "loss_nats_per_token": 1.0, "perplexity": 2.7, "tasks": {"t": 0.5}, "seconds": 1.0}
]
TABLE = {
    "candidates": [
        {
            **{"name": "x", "sizes": {"ffn": 4}, "layers": None, "costs": {"params": 9}, "after_cut": 3.0, "loss": 2.0},
            **{"curve": {"4": 2.0}, "score": None, "front": True, "winner": True},
        }
    ],
    **{"by": "loss", "costs": ["params"], "settled": [[4, 1.0]]},
}
SPEEDS = {
    "shapes": {"teacher": vars(SHAPE)},
    "weight_bytes": {"teacher": 2},
    "rows": [{"inputs": 4, "outputs": 4, "batch": 1, "teacher": {"token_ms": 3.0}}],
}
STAGE = {"fingerprint": "a", "result": {"hash": "b"}, "seconds": 2.0, "peak_bytes": 9}
PREDICTED = {"model": "m", "parameters": {"teacher": 9}, "export_bytes": 9, "rank_bytes": 9}
PREDICTED |= {"flops": {"distill": 9}, "teacher_flops": 3}
STATUS = {"stages": {"prepare": "done", "distill": "running"}, "since": 2.0, "ended": False, "why": ""}
STATUS |= {"host": "h", "process": 9}
LINE = {"time": "2026-01-02T03:04:05+00:00", "stage": "distill", "done": 1, "total": 2, "unit": "steps"}
LINE |= {"loss": 1.0, "tokens_per_second": 9.0}


def shown(path: Path) -> None:
    Console(file=io.StringIO()).print(describe(path))


def seen(path: Path) -> None:
    """Run every reader on a run folder."""
    run = path.parent if (path.parent / "recipe.yaml").is_file() else path.parents[1]
    report_run(run)
    watch(run, Console(file=io.StringIO()))
    shown(run)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "pruned/plan.json": (plan, shown),
    "scores/depth.json": (depth, shown),
    "summary.json": (written(ROWS), seen),
    "versions.json": (written({"torch": "2"}), seen),
    "predicted.json": (written(PREDICTED), seen),
    "status.json": (written(STATUS), seen),
    "stages/distill.json": (written(STAGE), seen),
    "search/table.json": (written(TABLE), seen),
    "metrics.jsonl": (written(LINE), seen),
    "bench/table.json": (written(SPEEDS), speed_rows),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run folder with a file of each kind; plots are not drawn."""
    monkeypatch.setattr(page, "_figure", lambda *_: "")
    for name, (write, _) in KINDS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text("model: m\n")
    return tmp_path


@pytest.mark.parametrize("name", KINDS)
def test_a_reader_gives_what_it_can_or_one_error(run: Path, name: str) -> None:
    path, read = run / name, KINDS[name][1]
    whole = json.loads(path.read_text())
    read(path)

    for number in range(TRIES):
        path.write_text(json.dumps(spoilt(whole, random.Random(number))) + "\n")
        try:
            read(path)
        except MinitronError as error:
            assert "\n" not in str(error)


def test_what_is_left_out_of_a_report_is_named_in_it(run: Path) -> None:
    for name in ("versions.json", "search/table.json", "stages/distill.json"):
        (run / name).write_text("{")
    (run / "metrics.jsonl").write_text('{"torn\n' + json.dumps(LINE) + '\n{"last')
    text = report_run(run).read_text()
    for name in ("versions.json", "search/table.json", "stages/distill.json"):
        assert f"{run / name} is not JSON" in text
    assert f"{run / 'metrics.jsonl'} has 1 invalid line, left out here." in text
