"""The example inside a Megatron-LM script runs, and its student learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.limits import HANGS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "megatron_lm_plugin" / "prune_and_distill.py"


def test_the_script_prunes_and_distils_its_own_model() -> None:
    options = ["--tensor-model-parallel-size=2", "--train-iters=30", "--distill-iters=30"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pruned: 270,912 -> 117,168 parameters" in done.stdout
    first, last = map(float, re.findall(r"distilled: KL ([\d.]+) -> ([\d.]+)", done.stdout)[0])
    assert 0 < last < first / 3
