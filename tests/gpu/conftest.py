"""Fixtures of the GPU tests; each test is skipped without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minitron_megatron.testing import Pool
from tests.tiny import checkpoints

__all__ = ["checkpoints"]


@pytest.fixture(autouse=True)
def a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU is here")


@pytest.fixture(scope="session")
def gpus() -> Iterator[Pool]:
    """Workers with one GPU each; the workers of `pool` see none."""
    with Pool(gpus=True) as workers:
        yield workers


@pytest.fixture
def two_gpus(gpus: Pool) -> Pool:
    if torch.cuda.device_count() < 2:
        pytest.skip("this needs two GPUs, and one is here")
    return gpus
