"""Run a client on the exports: `read_CLIENT.py FOLDER` reads each one in a child process, which is restarted if the
client aborts. Runs in the client's environment, where this project is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

SECONDS = 3600
"""Timeout of a child process."""

Read = Callable[[Path, list[int]], np.ndarray]
"""(export, tokens) -> logits or log-probabilities [positions, vocabulary] after each token, or each but the last."""


def main(client: str, package: str, read: Read) -> None:
    """Write FOLDER/read/CLIENT/NAME.npy (log-probabilities) or NAME.txt (the error)."""
    work, worker = Path(sys.argv[1]), sys.argv[2:] == ["worker"]
    out = work / "read" / client
    if worker:
        for export in _left(work, out):
            (out / "at").write_text(export.name)
            _read_one(work, export, out, read)
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "version").write_text(version(package))
    while left := _left(work, out):
        (out / "at").write_text(left[0].name)
        call = [sys.executable, sys.argv[0], str(work), "worker"]
        try:
            done = subprocess.run(call, stderr=subprocess.PIPE, text=True, timeout=SECONDS, check=False)
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        except subprocess.TimeoutExpired:
            said = [f"nothing in {SECONDS} seconds"]
        if _left(work, out):
            (out / f"{(out / 'at').read_text()}.txt").write_text(_reason(said))
    for export in sorted((work / "exports").iterdir()):
        failed = out / f"{export.name}.txt"
        print(f"{client:<12} {export.name:<28} {failed.read_text() if failed.exists() else 'read'}")


def _left(work: Path, out: Path) -> list[Path]:
    """Return the exports that were not tried yet."""
    tried = {path.stem for path in (*out.glob("*.npy"), *out.glob("*.txt"))}
    return [export for export in sorted((work / "exports").iterdir()) if export.name not in tried]


def _reason(said: list[str]) -> str:
    """Return the last line with an error, or else the last line."""
    errors = [line for line in said if any(word in line for word in ("Error", "ASSERT", "error"))]
    return (errors or said)[-1].strip()[-300:]


def _read_one(work: Path, export: Path, out: Path, read: Read) -> None:
    expected = np.load(work / "expected" / f"{export.name}.npy")
    try:
        logits = np.asarray(read(export, json.loads((work / "tokens.json").read_text())), dtype=np.float64)
        assert logits.shape[1] == expected.shape[1], f"a vocabulary of {logits.shape[1]}, not {expected.shape[1]}"
    except Exception as error:
        traceback.print_exc()
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        (out / f"{export.name}.txt").write_text(f"{type(error).__name__}: {reason.strip()[:300]}")
        return
    peak = logits.max(-1, keepdims=True)
    np.save(out / f"{export.name}.npy", logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True)))
