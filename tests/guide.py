"""Extraction and running of the commands in a documentation page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.limits import HANGS
from tests.warm import PYTHON, warm

__all__ = ["ROOT", "commands", "run_command"]

ROOT = Path(__file__).parents[1]


def commands(page: Path) -> list[str]:
    """Return the indented lines of a page that start `make`, `minitron` or a launch script."""
    lines = re.findall(r"^ {4,}((?:make|minitron|launch)\b.*)$", page.read_text(), re.M)
    return [line.split("  #")[0].strip() for line in lines]


def run_command(line: str, folder: Path, places: Mapping[str, Path]) -> subprocess.CompletedProcess[str]:
    """Run a line of a page in `folder`, with the paths that it names replaced by real ones."""
    for named, place in {"launch/": ROOT / "launch", "examples/": ROOT / "examples", **places}.items():
        line = line.replace(named, f"{place}/" if named.endswith("/") else str(place))
    environment = warm(os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GRACE_SECONDS": "1"})
    cold = line.startswith("minitron rehearse")  # a warm interpreter has the CPU's backend, which it refuses
    line = re.sub(r"^minitron", f"{sys.executable if cold else PYTHON} -m minitron_megatron", line)
    return subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )
