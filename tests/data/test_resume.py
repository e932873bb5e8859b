"""`prepare` goes on after a kill with the same bytes, stops when there are tokens enough, and goes on for more."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_megatron.data import prepare
from minitron_megatron.data.prepare import Position
from minitron_megatron.data.token_writer import PairWriters
from minitron_megatron.errors import DataError, FileError, Preempted
from minitron_megatron.events import Event
from tests.chats import CHATML, ENDS, write_tokenizer
from tests.data.test_prepare import snapshot, stored

MODULE = sys.modules[prepare.__module__]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder of text: three files of 100 documents each, one of them compressed."""
    return write_source(tmp_path / "in", '"text"')


def write_source(folder: Path, key: str) -> Path:
    """key: JSON before each text."""
    folder.mkdir()
    texts = [f"w{1 + i} " * (1 + i % 9) + (r"\ud83d" if i == 30 else "") for i in range(300)]
    parts = ["".join(f'{{{key}: "{text}"}}\n' for text in texts[i : i + 100]) for i in (0, 100, 200)]
    (folder / "a.jsonl").write_text(parts[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(parts[1].encode()))
    (folder / "c.json").write_text(parts[2])
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "BATCH_CHARS", 200)
    monkeypatch.setattr("minitron_megatron.data.token_writer.SAVE_SECONDS", 0.0)


def stopping(error: BaseException, after: int) -> Callable[[Event], None]:
    """Return a listener that raises an error at its n-th event."""
    seen: list[Event] = []

    def listen(event: Event) -> None:
        seen.append(event)
        if len(seen) == after:
            raise error

    return listen


def whole(source: Path, tokenizer: Path, folder: Path, **options: Any) -> dict[str, bytes]:
    with pytest.warns(UserWarning, match=r"1 unpaired surrogates .* the first in .*a\.jsonl:31"):
        prepare([source], tokenizer, folder / "a", validation=0.2, **options)
    return snapshot(folder)


@pytest.mark.parametrize("after", [1, 9])
def test_an_interrupted_call_goes_on_where_it_was(after: int, source: Path, tokenizer: Path, tmp_path: Path) -> None:
    expected = whole(source, tokenizer, tmp_path / "whole")
    for error in (KeyboardInterrupt(), Preempted("now"), OSError(28, "No space left on device")):
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else (Preempted, FileError)
        with pytest.raises(kind):
            prepare([source], tokenizer, tmp_path / "x" / "a", validation=0.2, listener=stopping(error, after))
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.partial"]
    events: list[Event] = []
    assert whole(source, tokenizer, tmp_path / "x", listener=events.append) == expected
    assert events[0].done > 0


@pytest.mark.parametrize("form", ["text", "chat"])
def test_a_killed_process_goes_on_to_the_same_bytes(form: str, tokenizer: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if form == "chat":
        tokenizer, options = write_tokenizer(tmp_path / "model", CHATML, ENDS["chatml"]), {"chat": "assistant"}
    source = write_source(tmp_path / "in", '"prompt": "Say", "response"' if options else '"text"')
    more = options | {"workers": 1 if options else 2}
    expected = whole(source, tokenizer, tmp_path / "whole", **options)
    script = (
        "import sys, time\n"
        "from minitron_megatron.data import prepare, token_writer\n"
        "sys.modules[prepare.__module__].BATCH_CHARS, token_writer.SAVE_SECONDS = 100, 0.0\n"
        "told = lambda event: (print(event.done, flush=True), time.sleep(0.05))\n"
        "if __name__ == '__main__':\n"
        f"    prepare([sys.argv[1]], sys.argv[2], sys.argv[3], validation=0.2, listener=told, **{more})\n"
    )
    (tmp_path / "script.py").write_text(script)
    words = [sys.executable, str(tmp_path / "script.py"), str(source), str(tokenizer), str(tmp_path / "x" / "a")]
    killed = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert killed.stdout
    lines = [killed.stdout.readline() for _ in range(12)]
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert all(lines) and killed.returncode == -signal.SIGKILL
    for column in (tmp_path / "x" / "a.partial").glob("train*.bin"):
        with column.open("ab") as torn:
            torn.write(b"written after the last save")
    events: list[Event] = []
    assert whole(source, tokenizer, tmp_path / "x", listener=events.append, **options) == expected
    assert events[0].done >= int(lines[-3])
    assert ("a.train.mask.bin" in expected) == (form == "chat")


@pytest.mark.parametrize(
    "change", ["a source", "the seed", "lost bytes", "other bytes", "torn progress", "lost lengths"]
)
def test_what_does_not_fit_is_made_anew(change: str, source: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare([source], tokenizer, tmp_path / "x" / "a", validation=0.2, listener=stopping(KeyboardInterrupt(), 15))
    partial, options = tmp_path / "x" / "a.partial", {"seed": 1} if change == "the seed" else {}
    if change == "a source":
        (source / "a.jsonl").write_text((source / "a.jsonl").read_text().replace("w1 ", "w7 "))
    elif change == "lost bytes":
        (partial / "train.bin").write_bytes((partial / "train.bin").read_bytes()[:20])
    elif change == "other bytes":
        content = (partial / "train.bin").read_bytes()
        (partial / "train.bin").write_bytes(bytes(20) + content[20:])
    elif change == "torn progress":
        (partial / "progress.json").write_text((partial / "progress.json").read_text()[:30])
    elif change == "lost lengths":
        (partial / "train.lengths").unlink()
    made = whole(source, tokenizer, tmp_path / "x", **options)
    assert made == whole(source, tokenizer, tmp_path / "fresh", **options)


def test_it_stops_at_the_document_that_is_enough_and_goes_on_for_more(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    def made(name: str, train: int, valid: int, workers: int = 1) -> Any:
        enough = {"train": train, "valid": valid}
        return prepare([source], tokenizer, tmp_path / name / "a", validation=0.2, enough=enough, workers=workers)

    expected = whole(source, tokenizer, tmp_path / "whole")
    documents = stored(tmp_path / "whole" / "a.train")
    few = made("x", 200, 20)
    assert 200 <= few.train.tokens < 210 + 20 and few.valid.tokens >= 20 and 0 < few.read < 0.5
    kept = stored(tmp_path / "x" / "a.train")
    assert kept == documents[: len(kept)]
    first = snapshot(tmp_path / "x")
    made("y", 200, 20, workers=2)
    assert snapshot(tmp_path / "y") == first  # however many processes work ahead
    more = made("x", 700, 20)
    made("z", 700, 20)
    assert snapshot(tmp_path / "x") == snapshot(tmp_path / "z") and more.train.tokens >= 700
    made("x", 200, 20)
    assert snapshot(tmp_path / "x") == first
    every = made("x", 10**9, 20)
    assert every.read == 1 and snapshot(tmp_path / "x") == expected


def test_a_damaged_corpus_is_not_continued(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    enough = {"train": 200, "valid": 20}
    prepare([source], tokenizer, tmp_path / "x" / "a", validation=0.2, enough=enough)
    data = tmp_path / "x" / "a.train.bin"
    data.write_bytes(bytes(10) + data.read_bytes()[10:])
    assert whole(source, tokenizer, tmp_path / "x") == whole(source, tokenizer, tmp_path / "fresh")


def test_named_held_out_files_are_read_whole(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text("".join(json.dumps({"text": f"w{i}"}) + "\n" for i in range(1, 200)))
    enough = {"train": 100, "valid": 5}
    made = prepare([source], tokenizer, tmp_path / "x" / "a", validation=[tmp_path / "v.jsonl"], enough=enough)
    assert made.valid and made.valid.documents == 199 and 100 <= made.train.tokens < 110


def test_wrong_input_leaves_nothing_to_go_on_from(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    (source / "c.json").write_text('{"text": "w1"}\n{"text": ')
    with pytest.raises(DataError, match=r"c\.json:2"):
        prepare([source], tokenizer, tmp_path / "x" / "a", validation=0.2)
    assert not list((tmp_path / "x").iterdir())


def test_positions_survive_json(tmp_path: Path) -> None:
    writers = PairWriters(tmp_path / "a", ["train"], [np.uint16], "key")
    writers.writers["train"].add(np.array([1, 2, 0], np.uint16))
    position = Position(1, 2, 3, 4, 5, "there")
    writers.save(position)
    assert Position(*PairWriters(tmp_path / "a", ["train"], [np.uint16], "key").position) == position
    assert PairWriters(tmp_path / "a", ["train"], [np.uint16], "another").position == []
