"""Record of a benchmark: measurements with versions, commit and machine, as a JSON line."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minitron_megatron.run.versions import versions

RESULTS = Path(__file__).parent / "results"


def record(name: str, **measured: Any) -> None:
    """Append a line to `results/NAME.jsonl` and print it."""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **measured, "cores": os.cpu_count(), **versions()}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(measured, indent=2))
