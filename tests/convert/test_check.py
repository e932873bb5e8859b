"""`check_folder` finds a folder that transformers reads as something else, at any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.convert import check_folder, load_hf
from minitron_megatron.data import Batch
from minitron_megatron.errors import CheckpointError
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

from .conftest import make_folder


def check(topology: Topology, model: Path, folder: Path) -> float:
    tokens = torch.randint(0, 509, (1, 32), generator=torch.Generator().manual_seed(3))
    return check_folder(load_hf(model, topology), folder, Batch(tokens, tokens, tokens >= 0), topology)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"dp": 2}])
def test_the_same_weights_pass(pool: Pool, hf_folder: Callable[[str], Path], layout: dict[str, Any]) -> None:
    found = pool.run(check, hf_folder("llama"), hf_folder("llama"), **layout)
    assert len(set(found)) == 1
    assert 0 < found[0] < 1e-4


def test_another_meaning_of_the_config_is_found(pool: Pool, hf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", "llama")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10000.0
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="other otherwise: logits differ"):
        pool.run(check, hf_folder("llama"), other, tp=2)


def test_a_folder_that_transformers_cannot_read(pool: Pool, hf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="transformers cannot read"):
        pool.run(check, hf_folder("llama"), tmp_path / "empty")
