"""What every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minitron_megatron.testing import Pool


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and a threaded sum may add in another order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Warm gloo processes, shared by the whole session."""
    with Pool() as workers:
        yield workers


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real checkpoints, tokenizers and texts that `MINITRON_TEST_ASSETS` names."""
    folder = os.environ.get("MINITRON_TEST_ASSETS")
    if not folder:
        pytest.skip("MINITRON_TEST_ASSETS names no folder of test assets")
    if not Path(folder).is_dir():
        pytest.fail(f"MINITRON_TEST_ASSETS is {folder}, which is no folder")
    return Path(folder)
