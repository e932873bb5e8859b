"""The GPU benchmark runs at toy size on any machine."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron_megatron.parallel import peak_flops
from tests.limits import HANGS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_distill.py"


def test_it_measures_both_students_with_both_losses() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--toy"], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    lines = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["student"] for line in lines] == ["width", "depth"]
    for line in lines:
        fused, unfused = line["fused"], line["unfused"]
        assert fused["peak_bytes"] < unfused["peak_bytes"]
        assert fused["tokens_per_second"] > 0 and (fused["utilisation"] is None) == (peak_flops() is None)
        shares = [each["student_tflops"] / each["tokens_per_second"] for each in (fused, unfused)]
        assert abs(shares[0] - shares[1]) < 1e-9 * shares[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit, match="No GPU is here"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
