"""Models loaded by transformers: local files only, no code from the folder, every failure a CheckpointError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError, MinitronError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["transformers_failures", "transformers_model"]

LONGEST = 300
"""Longest cause that a message quotes, in characters: some errors print a whole list of names."""


def transformers_model(folder: Path, dtype: torch.dtype | str = "auto", *, random: bool = False) -> PreTrainedModel:
    """Return the folder's model in transformers, ready to run on the CPU without dropout.

    dtype: dtype of the weights; `auto`: the folder's. random: build it with random weights, from config.json alone.
    Raises CheckpointError if transformers fails.
    """
    with transformers_failures("read", folder), torch.no_grad():
        from transformers import AutoConfig, AutoModelForCausalLM

        if random:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            built_dtype = config.dtype if dtype == "auto" else dtype
            model = AutoModelForCausalLM.from_config(config, dtype=built_dtype, trust_remote_code=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        _check_experts(model)
    return model.eval()


@contextmanager
def transformers_failures(verb: str, folder: Path) -> Iterator[None]:
    """Turn any error that transformers raises about `folder` into a CheckpointError that names the folder."""
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:  # its readers raise errors of many classes
        cause = first_line(error)
        shown = f"{cause}." if len(cause) <= LONGEST else f"{cause[:LONGEST]}..."
        raise CheckpointError(f"transformers cannot {verb} {folder}: {shown}") from error


def _check_experts(model: PreTrainedModel) -> None:
    """Run experts one by one if transformers' grouped matmul refuses their width (rows of 16-byte multiples)."""
    try:
        model(torch.zeros(1, 1, dtype=torch.int64))
    except RuntimeError:
        if not hasattr(model, "set_experts_implementation"):
            raise
        model.set_experts_implementation("eager")
