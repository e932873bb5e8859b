"""Models as transformers reads them: from local files alone, without code of the folder's, every failure one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, MinitronError

__all__ = ["transformers_failures", "transformers_model"]

LONGEST = 300
"""Characters of a cause that are passed on: some print a whole list of names."""


def transformers_model(folder: Path, dtype: torch.dtype | str = "auto", *, random: bool = False) -> Any:
    """Return the folder's model in transformers, ready to run on the CPU without dropout.

    dtype: of the weights; `auto`: what the folder says. random: build it from config.json alone. Raises CheckpointError
    where transformers cannot.
    """
    with transformers_failures("read", folder), torch.no_grad():
        from transformers import AutoConfig, AutoModelForCausalLM

        if random:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            made = config.dtype if dtype == "auto" else dtype
            model = AutoModelForCausalLM.from_config(config, dtype=made, trust_remote_code=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        _check_experts(model)
    return model.eval()


@contextmanager
def transformers_failures(verb: str, folder: Path) -> Iterator[None]:
    """Around what transformers does with `folder`: whatever it raises becomes a CheckpointError that names it."""
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:  # of any class: its readers raise what they come upon
        lines = str(error).strip().splitlines() or [type(error).__name__]
        cause = lines[0] if len(lines[0]) <= LONGEST else lines[0][:LONGEST] + "..."
        raise CheckpointError(f"transformers cannot {verb} {folder}: {cause.rstrip('.')}.") from error


def _check_experts(model: Any) -> None:
    """Have the experts run one by one where transformers' grouped matmul refuses their width (rows of 16 bytes)."""
    try:
        model(torch.zeros(1, 1, dtype=torch.int64))
    except RuntimeError:
        if not hasattr(model, "set_experts_implementation"):
            raise
        model.set_experts_implementation("eager")
