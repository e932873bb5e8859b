"""Stages shared by runs: what one run has made is taken by every run whose stage has the same fingerprint."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError
from ..events import Event, Listener
from ..files import (
    MANIFEST,
    check_as,
    files_below,
    locked,
    parse_json,
    read_as,
    verify_checksums,
    whole_file,
    whole_folder,
    write_checksums,
    write_json,
)
from ..run_folder import RunFolder
from .stage import Record, Stage

__all__ = ["SharedStages"]

FILES, RECORD = "files", "record.json"
WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class SharedStages:
    """Folder of finished stages: an entry per stage and fingerprint, with the outputs as hard links, the record and the
    stage's lines of metrics, and the checksums of them all.

    Where the file system has no hard links, files are copied. No method is collective: rank 0 calls them.
    """

    path: Path

    def _entry(self, stage: Stage, mark: str) -> Path:
        return self.path / stage.name / mark[:32]

    @contextmanager
    def claimed(self, stage: Stage, mark: str, listener: Listener) -> Iterator[None]:
        """Hold the lock of an entry, so that one run at a time makes it; wait while another process holds it."""
        entry = self._entry(stage, mark)
        entry.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with locked(entry.with_suffix(".lock")) as acquired:
                if acquired:
                    yield
                    return
            listener(Event(f"wait for {stage.name}", 0, 1, "runs"))
            time.sleep(WAIT_SECONDS)

    def take(self, stage: Stage, mark: str, run: RunFolder) -> Record | None:
        """Put an entry's outputs, metrics and record into a run folder; return the record, or None without an entry.

        A damaged entry is removed with a warning, and counts as none.
        """
        entry = self._entry(stage, mark)
        if not entry.is_dir():
            return None
        try:
            verify_checksums(entry / MANIFEST)
            record = read_as(entry / RECORD, Record)
            check_as(record["result"], stage.result, f"{entry / RECORD}: result")
        except FileError as error:
            warnings.warn(f"{error} The stage {stage.name} is done again.", stacklevel=4)
            shutil.rmtree(entry)
            return None
        for output in _outputs(stage, run):
            _put(entry / FILES / output.relative_to(run.path), output)
        if (lines := RunFolder(entry).metrics).is_file():
            _append(run.metrics, lines.read_bytes())
        write_json(run.record(stage.name), record)
        return record

    def give(self, stage: Stage, record: Record, run: RunFolder) -> None:
        """Make an entry of a stage that a run has just finished."""
        with whole_folder(self._entry(stage, record["fingerprint"])) as entry:
            for output in _outputs(stage, run):
                if output.exists():
                    _put(output, entry / FILES / output.relative_to(run.path))
            if lines := _metrics(stage, run.metrics):
                RunFolder(entry).metrics.write_bytes(lines)
            write_json(entry / RECORD, record)
            write_checksums(entry / MANIFEST, files_below(entry))


def _outputs(stage: Stage, run: RunFolder) -> list[Path]:
    return [stage.makes(run), *stage.makes_too(run)]


def _put(source: Path, target: Path) -> None:
    """Replace `target` by hard links to a file or to the files of a folder; remove it if there is no `source`."""
    if source.is_dir():
        with whole_folder(target) as partial:
            for file in files_below(source):
                _link(file, partial / file.relative_to(source))
    elif source.is_file():
        with whole_file(target) as partial:
            partial.unlink(missing_ok=True)
            _link(source, partial)
    elif target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _append(path: Path, lines: bytes) -> None:
    """Append lines to a file, in place of a last line that a kill truncated."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines)


def _metrics(stage: Stage, path: Path) -> bytes:
    """Return a stage's lines of `metrics.jsonl`; a line that a kill truncated is left out."""
    kept = bytearray()
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            fields = parse_json(line.decode(), str(path))
        except ValueError:  # a FileError is one too
            continue
        if isinstance(fields, dict) and fields.get("stage") == stage.name:
            kept += line
    return bytes(kept)
