"""Write text that the studies' teacher was not trained on: C++ headers of torch, which every machine has.

    python examples/studies/other_text.py WORK

writes `headers.jsonl`, one header per document, and `headers.valid.jsonl`, a fiftieth that is held out, to WORK. The
studies `correction` and `phases` distil on it.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

FOLDERS = ("c10", "torch/csrc")
"""Folders of torch's headers that people wrote; others are generated."""

HELD_OUT_EVERY = 50


def headers() -> list[str]:
    """Return every header once, in the order of their names."""
    root = Path(sysconfig.get_path("purelib")) / "torch" / "include"
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.h"))
    return [*dict.fromkeys(path.read_text(encoding="utf-8") for path in paths)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes text that the studies' teacher was not trained on.")
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    every = headers()
    held_out = every[::HELD_OUT_EVERY]
    del every[::HELD_OUT_EVERY]
    for name, texts in (("headers", every), ("headers.valid", held_out)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}.jsonl: {len(texts)} headers, {len(lines):,} bytes")


if __name__ == "__main__":
    main()
