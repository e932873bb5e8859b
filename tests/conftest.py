"""Fixtures for all tests."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minitron_megatron.testing import Pool
from tests.recipes import material, recipe_file

__all__ = ["material", "recipe_file"]

multiprocessing.set_forkserver_preload(["tests.warm.imports", "tests.tiny", "lm_eval.evaluator"])  # of the pool

LONGEST = (
    "run/test_search.py",
    "test_guide.py",
    "run/test_run.py",
    "slurm/test_slurm.py",
    "run/test_align.py",
    "train/test_loop.py",
    "rehearsal/test_machine.py",
    "evaluate/test_tasks.py",
    "run/test_tasks.py",
    "run/test_phases.py",
    "studies/test_studies.py",
    "cli/test_faults.py",
    "distill/test_objective.py",
)
"""Slowest test files, run first, so that two processes that take a file at a time finish at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    order = {tests / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread: small tensors gain nothing from more, and the order of a threaded sum may vary."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """Exclude objects of earlier imports from garbage collection, which the tests cause often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Pool of warm gloo processes, shared by the whole session."""
    with Pool() as workers:
        yield workers


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of real checkpoints, tokenizers and texts that `MINITRON_TEST_ASSETS` names."""
    folder = os.environ.get("MINITRON_TEST_ASSETS")
    if not folder:
        pytest.skip("MINITRON_TEST_ASSETS names no folder of test assets")
    if not Path(folder).is_dir():
        pytest.fail(f"MINITRON_TEST_ASSETS is {folder}, which is not a folder")
    return Path(folder)
