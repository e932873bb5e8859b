"""A folder is the old one or the new one, whenever a kill comes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_megatron import files

WRITER = """
import os, pathlib, signal, sys
from minitron_megatron import files

folder, kill_at, can_exchange = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
exchange, seen = files._exchange, 0

def step(event, *_):
    global seen
    if event in ("os.rename", "os.remove", "os.rmdir", "exchange"):
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

def swap(one, other):
    step("exchange")
    return can_exchange and exchange(one, other)

files._exchange = swap
with files.whole_folder(folder) as partial:
    (partial / "text").write_text("new")
    sys.addaudithook(step)
"""


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new(tmp_path: Path, can_exchange: bool) -> None:
    """Where names cannot be exchanged, the old one may wait under another name for the next writer, who may fail."""
    seen = set()
    for kill_at in range(1, 20):
        folder = tmp_path / f"at-{kill_at}"
        folder.mkdir()
        (folder / "text").write_text("old")
        code = subprocess.run([sys.executable, "-c", WRITER, str(folder), str(kill_at), str(can_exchange)]).returncode
        if not folder.exists():
            assert not can_exchange
            with pytest.raises(KeyboardInterrupt), files.whole_folder(folder):
                raise KeyboardInterrupt
        seen.add((folder / "text").read_text())
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert seen == {"old", "new"} and kill_at > 2
    assert (folder / "text").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir() if path.stem == folder.name] == [folder.name]


def test_names_are_exchanged_here_or_not_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    swapped = files._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / ("b" if swapped else "a")).exists()
    assert not files._exchange(tmp_path / "a", tmp_path / "nothing")


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text, error in (("old", None), ("new", OSError)):
        try:
            with files.whole_folder(folder) as partial:
                (partial / "text").write_text(text)
                if error:
                    raise error
        except OSError:
            pass
        assert (folder / "text").read_text() == "old"
        assert list(tmp_path.iterdir()) == [folder]
