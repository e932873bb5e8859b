"""Rehearsal of every preset of examples/presets on a cluster of 256 GPUs that is not there. All results are modelled.

    python benchmarks/rehearse_presets.py [--gpus 256] [--preset NAME] [--golden]

One process a preset rehearses `distill` on every kind of rank, with the teacher's config alone. A line holds the peak
bytes by kind of rank, FLOPs, communication bytes, modelled utilisation, and the CPU seconds of the whole process.
`--golden` also writes the exact numbers to tests/rehearsal/presets.json, with which the tests compare.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "rehearsal" / "presets.json"
sys.path[:0] = [str(ROOT)]


def rehearsed(name: str, gpus: int) -> dict[str, Any]:
    """Rehearse a preset, or a student of one (`minitron/8b`), in this process."""
    import torch

    from minitron_megatron.rehearsal import rehearse
    from tests.rehearsal.golden import numbers_of, preset

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        found = rehearse(preset(name, Path(folder)), gpus=gpus)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "preset": name,
        "gpus": gpus,
        "fits_80_gib": found.fits,
        "modelled_seconds_of_a_step": found.seconds,
        "modelled_utilisation": found.utilisation,
        "modelled_hours": found.hours,
        "ranks": {each.kind.name: numbers_of(each) for each in found.ranks},
        "cpu_seconds": round(time.process_time(), 1),
        "peak_rss_bytes": most * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Rehearse the presets; modelled, not measured.")
    parser.add_argument("--gpus", type=int, default=256)
    parser.add_argument("--preset", help="one preset alone, in this process; prints JSON")
    parser.add_argument("--golden", action="store_true", help="write tests/rehearsal/presets.json")
    asked = parser.parse_args()
    if asked.preset:
        print(json.dumps(rehearsed(asked.preset, asked.gpus)))
        return
    from record import record

    from tests.rehearsal.golden import NAMES

    golden = {}
    for name in NAMES:
        command = [sys.executable, __file__, "--preset", name, "--gpus", str(asked.gpus)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        record("rehearse_presets", **found)
        golden[name] = found["ranks"]
    if asked.golden:
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
