"""A kill at any time leaves the old folder or the new one; a file that has changed or is damaged gives an error."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron import files
from minitron_megatron.errors import FileError

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
    """Without an atomic swap, the old folder may remain under another name until the next writer, which may fail."""
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


# ---- reading


@dataclass(frozen=True)
class Note:
    words: list[str]
    weight: float | None = None


def test_json_has_no_nan_and_comes_back_as_its_type(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    files.write_json(path, {"words": ["a"], "weight": float("nan"), "more": [1.0, float("inf")]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["more"] == [1.0, None]
    assert files.read_as(path, Note) == Note(["a"], None)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"words": "a"}', b'{"words": [1]}', b'{"weight": 1}'),
        *(b'{"words": [], "weight": NaN}', b'{"words": [], "weight": 1e999}', b'{"words": [], "weight": true}'),
        *(b'{"words": ["\\ud800"]}', b'{"words": ' + b"[" * 100_000, b'{"words": [], "weight": ' + b"9" * 5000 + b"}"),
    ],
)
def test_what_is_torn_or_of_another_kind_is_one_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"note\.json") as caught:
        files.read_as(path, Note)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."),
        (b'{"a": [1, NaN]}', "is not JSON: a.1 is nan, and JSON's numbers are finite."),
        (b"\xff", "is not UTF-8: invalid start byte at byte 0."),
        (b"[" * 100_000, "is nested too deeply to be read."),
    ],
    ids=["torn", "NaN", "no UTF-8", "deep"],
)
def test_the_place_in_what_is_no_json_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        files.read_json(path)
    assert str(caught.value) == f"{path} {said}"


PLACES: list[Callable[[Path], Path]] = [
    lambda folder: folder / "file" / "below",
    lambda folder: folder / "dangling" / "below",
    lambda folder: folder / ("x" * 300),
    lambda folder: folder / "nul\0",
]
USES: list[Callable[[Path], Any]] = [
    lambda path: files.write_json(path, 1),
    lambda path: files.read_json(path),
    lambda path: files.checksum(path),
    lambda path: files.locked(path).__enter__(),
    lambda path: files.whole_folder(path).__enter__(),
]


@pytest.mark.parametrize("place", range(len(PLACES)))
@pytest.mark.parametrize("use", range(len(USES)))
def test_a_path_that_cannot_be_used_is_one_error_that_names_it(tmp_path: Path, place: int, use: int) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    if place == 1 and use in (0, 4):
        (tmp_path / "nowhere").write_text("")  # otherwise missing folders would be created
    with pytest.raises(FileError, match=r"cannot be (read|written)") as caught:
        USES[use](PLACES[place](tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="Not a directory"), files.whole_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


# ---- checksums


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Checksum list of files in two folders."""
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / ("in" if number % 2 else ".") / f"{number}").write_bytes(bytes(number + 1))
    inside = [path for path in tmp_path.rglob("*") if path.is_file()]
    files.write_checksums(tmp_path / files.MANIFEST, inside[1:], {str(inside[0].relative_to(tmp_path)): "0" * 64})
    known = files.read_json(tmp_path / files.MANIFEST)
    known[str(inside[0].relative_to(tmp_path))] = files.checksum(inside[0])
    files.write_json(tmp_path / files.MANIFEST, known)
    return tmp_path / files.MANIFEST


def test_each_file_is_read_by_one_of_those_who_share(listed: Path) -> None:
    for path in [path for path in listed.parent.rglob("*") if path.is_file() and path != listed]:
        whole = path.read_bytes()
        path.write_bytes(b"\1" + whole[1:])
        found = []
        for share in range(3):
            try:
                files.verify_checksums(listed, share=(share, 3))
            except FileError as error:
                found.append(str(error))
        assert len(found) == 1 and str(path) in found[0]
        path.write_bytes(whole)
    files.verify_checksums(listed)


ABSENT = "{folder}/{name} is missing, although {list} beside it lists it."
OUTSIDE = "{folder}/{list} is not a list of checksums: its entry for '{name}' is '{digest}'."


@pytest.mark.parametrize(
    ("name", "said"), [("missing", ABSENT), ("in", ABSENT), ("../outside", OUTSIDE), ("/etc/hostname", OUTSIDE)]
)
def test_a_list_names_plain_files_of_its_folder(listed: Path, name: str, said: str) -> None:
    (listed.parent.parent / "outside").write_text("")
    files.write_json(listed, files.read_json(listed) | {name: "0" * 64})
    with pytest.raises(FileError) as caught:
        files.verify_checksums(listed, share=(2, 3))
    assert str(caught.value) == said.format(folder=listed.parent, name=name, list=listed.name, digest="0" * 64)
