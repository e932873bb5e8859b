"""Modelled speed of a rehearsal beside published measurements on H100 GPUs.

    python benchmarks/rehearse_published.py

Neither layouts nor kernels are the same: what is published ran with sharded parameters (torchtitan, Megatron-Bridge) or
a layout that is not said (ModelOpt). A ratio above 1: the model of the machine is too fast, or this project's code
would be faster.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
PRESET = "llama-3.1-minitron-4b-width"


@dataclass(frozen=True)
class Published:
    """A measurement, and the stage and the keys of the preset that come nearest to it."""

    source: str
    tokens: float
    """Tokens per second and GPU."""
    gpus: int
    stage: str
    overrides: tuple[str, ...]


EIGHT = ("parallel={tp: 1, cp: 2}", "correct.global_batch=128", "distill={global_batch: 128, micro_batch: 1}")
SIX_BILLION = ("data.sequence=4096", "prune={hidden: 3584, ffn: 11776}")
CASES = (
    Published("torchtitan, 2024-12: Llama 3.1 8B pretraining, bf16, eager", 5762, 8, "correct", EIGHT),
    Published("torchtitan, 2024-12: the same with torch.compile", 6667, 8, "correct", EIGHT),
    Published("Megatron-Bridge, 25.11: Llama 3 8B pretraining, FP8 (here bf16)", 14451, 8, "correct", EIGHT),
    Published(
        "ModelOpt: distillation of 8B to 6B, here at tp 2", 4600, 256, "distill", (*SIX_BILLION, "parallel.tp=2")
    ),
    Published(
        "ModelOpt: distillation of 8B to 6B, here at tp 8", 4600, 256, "distill", (*SIX_BILLION, "parallel.tp=8")
    ),
)


def rehearsed(case: Published) -> tuple[float, float]:
    """Return (modelled tokens per second and GPU, utilisation), in this process."""
    from minitron_megatron.rehearsal import rehearse
    from tests.rehearsal.golden import preset

    with TemporaryDirectory() as folder:
        recipe = preset(PRESET, Path(folder), case.overrides)
        found = rehearse(recipe, gpus=case.gpus, stage=case.stage, kinds=lambda kinds: kinds[-1:])
    return found.tokens / found.seconds / found.gpus, found.utilisation or 0.0


def main() -> None:
    if len(sys.argv) > 1:  # one case, in a process of its own
        print(json.dumps(rehearsed(CASES[int(sys.argv[1])])))
        return
    from record import record

    for number, case in enumerate(CASES):
        command = [sys.executable, __file__, str(number)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        modelled, utilisation = json.loads(said.splitlines()[-1])
        record(
            "rehearse_published",
            source=case.source,
            published_tokens_per_second_and_gpu=case.tokens,
            modelled_tokens_per_second_and_gpu=round(modelled),
            modelled_over_published=round(modelled / case.tokens, 2),
            modelled_utilisation=round(utilisation, 3),
        )


if __name__ == "__main__":
    main()
