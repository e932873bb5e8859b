"""One run with all loggers, and the commands `watch`, `evaluate --model` and `export --check` on it."""

from __future__ import annotations

import json
import secrets
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_megatron.errors import RecipeError
from minitron_megatron.events import Event
from minitron_megatron.files import read_json, write_json
from minitron_megatron.report import logged, read_metrics
from tests.cli.test_commands import call, say
from tests.recipes import tiny_recipe

Points = dict[str, dict[int, float]]
"""`stage/measurement` -> step -> last logged value."""


SECRETS = {"WANDB_API_KEY": secrets.token_hex(20), "HF_TOKEN": f"hf_{secrets.token_hex(17)}"}


@pytest.fixture(scope="module")
def recipe(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of a finished run with every logger."""
    folder = tmp_path_factory.mktemp("logged")
    keys = tiny_recipe(material) | {"out": str(folder / "run"), "random_baseline": False}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys | {"log": {"wandb": "offline", "tensorboard": True}}))
    done = call("run", folder / "recipe.yaml", **SECRETS)
    assert done.returncode == 0, done.stderr
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    return recipe.parent / "run"


@pytest.fixture(scope="module")
def truth(run: Path) -> Points:
    points: Points = defaultdict(dict)
    for line in read_metrics(run / "metrics.jsonl"):
        for name, value in line.items():
            if name not in ("time", "stage", "done", "total", "unit"):
                points[f"{line['stage']}/{name}"][line["done"]] = value
    assert len(points["distill/loss"]) == 6
    assert min(points["machine/process_bytes"].values()) > 1e8
    return points


def records(file: Path) -> Iterator[bytes]:
    """Yield the records of wandb's file, a LevelDB log: a header of 7 bytes, then blocks of 32 KiB with pieces of
    records, each preceded by checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last)."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room in the block for another piece
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def history(file: Path) -> Iterator[dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def test_wandb_has_what_the_metrics_have(run: Path, truth: Points) -> None:
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    found: Points = defaultdict(dict)
    for row in history(file):
        (step,) = (value for name, value in row.items() if name.endswith("/step"))
        for name, value in row.items():
            if not name.startswith("_") and not name.endswith("/step"):
                found[name][step] = value
    assert dict(found) == dict(truth)
    assert read_json(run / "wandb.json")["id"] in file.name


def test_a_run_that_goes_on_is_one_run_to_wandb(tmp_path: Path) -> None:
    write_json(tmp_path / "versions.json", {})
    for step in (1, 2):
        with logged(tmp_path, {}, wandb="offline") as tell:
            tell(Event("distill", step, 2, values={"loss": 1.0 / step}))
        time.sleep(1.1)  # wandb cannot tell apart two runs that start in the same second
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert sorted(row["distill/loss"] for file in files for row in history(file)) == [0.5, 1.0]
    assert {file.name for file in files} == {f"run-{read_json(tmp_path / 'wandb.json')['id']}.wandb"}


def test_no_secret_is_kept(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in SECRETS.values():
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_tensorboard_has_what_the_metrics_have(run: Path, truth: Points) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(truth)
    for name, points in truth.items():
        got = {each.step: each.value for each in events.Scalars(name)}
        assert got == pytest.approx(points, rel=1e-6)  # fp32 there


def test_watch_and_show_tell_each_stage_and_the_end(run: Path) -> None:
    said = say("watch", run)
    for line in ("prepare done 2,214 tokens", "score done", "prune done kept layers 4", "export done weights in"):
        assert line in " ".join(said.split())
    assert said.rstrip().endswith("Done.")


def test_any_folder_is_evaluated_by_the_recipe(run: Path, recipe: Path) -> None:
    """Evaluate on two pipeline stages."""
    rows = {row["model"]: row for row in read_json(run / "summary.json")}
    said = call("evaluate", recipe, "--model", run / "pruned", "--set", "parallel.pp=2", ranks=2)
    assert said.returncode == 0, said.stderr
    loss = f"{rows['pruned']['loss_nats_per_token']:.4f}"
    assert sum(loss in line for line in said.stdout.splitlines()) == 2  # the run's own row, and the folder's


def test_another_vocabulary_does_not_compare(recipe: Path, tmp_path: Path) -> None:
    from tests.convert.conftest import make_folder

    said = call("evaluate", recipe, "--model", make_folder(tmp_path / "other", "llama"))
    assert said.returncode == 2
    assert "has a vocabulary of 509" in said.stderr


@pytest.mark.parametrize("split", ["tp", "pp"])
def test_the_export_is_the_student(recipe: Path, split: str) -> None:
    said = call("export", recipe, "--check", "--set", f"parallel.{split}=2", ranks=2)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("transformers gives the student's logits") == 1


def test_a_logger_that_is_not_installed_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron_megatron.report.loggers.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install tensorboard"), logged(tmp_path, {}, tensorboard=True):
        pass
