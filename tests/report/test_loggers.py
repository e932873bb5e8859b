"""Loggers that cannot open are one message with what would open them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.errors import CheckpointError, RecipeError
from minitron_megatron.events import Event
from minitron_megatron.files import write_json
from minitron_megatron.report import describe, logged
from minitron_megatron.run_folder import RunFolder


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("minitron_megatron.report.loggers.find_spec", lambda _: None)
    options = {"wandb": "offline"} if name == "wandb" else {"tensorboard": True}
    with pytest.raises(RecipeError) as caught, logged(tmp_path, {}, **options):  # type: ignore[arg-type]
        pass
    assert str(caught.value) == f"`{name}` is set, but {name} is not installed. Run `pip install {name}`."


def test_a_refusal_of_wandb_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuses(**_: object) -> None:
        raise ConnectionError("no API key.\nSee https://...")

    stub = SimpleNamespace(Error=ConnectionError, Settings=lambda **_: None, init=refuses)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr("minitron_megatron.report.loggers.find_spec", lambda _: stub)
    write_json(RunFolder(tmp_path).versions, {})
    with logged(tmp_path, {}, wandb="online") as listen, pytest.raises(RecipeError) as caught:
        listen(Event("distill", 1, 2, values={"loss": 1.0}))
    assert str(caught.value) == "wandb failed: no API key. Run `wandb login`, or set `wandb` to offline."


def test_a_folder_of_nothing_that_a_run_makes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        describe(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is not a scores file, a plan, a model folder or a run folder. Give one of these."
    )
