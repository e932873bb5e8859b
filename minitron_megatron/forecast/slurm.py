"""Slurm commands that submit a recipe."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from ..errors import TopologyError
from .estimate import Estimate

__all__ = ["slurm_commands"]

NODE_GPUS = 8
"""GPUs of a DGX H100 node."""
LONGEST_HOURS = 4.0
"""Longest time limit. A longer run is requeued and resumes; shorter jobs start sooner."""
SHORTEST_HOURS = 0.25
SLACK = 1.5
"""Requested over estimated time: the estimate leaves out loading, evaluation and saving."""


def slurm_commands(recipe: Path, arguments: Sequence[str], found: Estimate) -> str:
    """Return the shell lines that submit a recipe on the estimated number of GPUs, from the project's folder.

    arguments: further arguments of `minitron run`. Raises TopologyError if the GPUs do not fill whole nodes.
    """
    nodes = ceil(found.gpus / NODE_GPUS)
    if found.gpus > NODE_GPUS and found.gpus % NODE_GPUS:
        raise TopologyError(
            f"{found.gpus} GPUs do not fill whole nodes of {NODE_GPUS}. Give --gpus {nodes * NODE_GPUS}."
        )
    options = [f"--nodes={nodes}", f"--time={_time(found.hours * SLACK)}"]
    lines = ["source slurm/cluster.env"]
    if found.gpus < NODE_GPUS:
        options.append(f"--gpus-per-node={found.gpus}")
        lines.insert(0, f"export MINITRON_GPUS={found.gpus}")
    lines.append(shlex.join(["sbatch", *options, "slurm/run.sbatch", str(recipe), *arguments]))
    return "\n".join(lines) + "\n"


def _time(hours: float) -> str:
    minutes = ceil(min(max(hours, SHORTEST_HOURS), LONGEST_HOURS) * 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:00"
