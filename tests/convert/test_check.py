"""`check_folder` finds a folder that transformers reads as something else, at any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.convert import check_folder, load_hf, transformers_failures
from minitron_megatron.convert.by_transformers import LONGEST
from minitron_megatron.convert.check import _difference
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
    with pytest.raises(CheckpointError, match="other as another model: logits differ"):
        pool.run(check, hf_folder("llama"), other, tp=2)


def broken(folder: Path, kind: str) -> Path:
    """Spoil a folder so that transformers raises the given class of error."""
    config = json.loads((folder / "config.json").read_text())
    changes: dict[str, Any] = {
        "OSError": {},
        "ValueError": {"model_type": "none of theirs", "auto_map": {"AutoConfig": "evil.Config"}},
        "KeyError": {"hidden_act": "no such function"},
        "strict dataclass": {"hidden_size": "forty"},
        "ZeroDivisionError": {"num_key_value_heads": 0},
        "fewer entries": {"vocab_size": 256},
    }[kind]
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: ...\n")
    if kind == "OSError":
        (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    "kind", ["OSError", "ValueError", "KeyError", "strict dataclass", "ZeroDivisionError", "fewer entries"]
)
def test_whatever_transformers_raises_is_one_error_that_names_the_folder(
    pool: Pool, hf_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder = broken(make_folder(tmp_path / "spoilt", "llama"), kind)
    with pytest.raises(CheckpointError, match=r"^transformers (cannot (read|run)|reads) .*/spoilt") as raised:
        pool.run(check, hf_folder("llama"), folder, tp=2)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert not (folder / "ran").exists()


def test_logits_of_another_shape_are_another_model() -> None:
    with pytest.raises(CheckpointError) as caught:
        _difference(torch.zeros(2, 3), torch.zeros(2, 4), Path("out"))
    assert str(caught.value) == (
        "transformers reads out as another model: its logits have shape (2, 4), the exported model's (2, 3). Export it "
        "again."
    )


def test_a_long_error_of_transformers_is_cut_short(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, transformers_failures("read", tmp_path):
        raise ValueError("x" * 1000 + "\nsecond line")
    assert str(caught.value) == f"transformers cannot read {tmp_path}: {'x' * LONGEST}..."


@pytest.mark.parametrize("width", [14, 15])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_of_any_width_are_checked(pool: Pool, tmp_path: Path, kind: str, width: int) -> None:
    """transformers' grouped matmul accepts only rows of multiples of 16 bytes."""
    key = "intermediate_size" if kind == "mixtral" else "moe_intermediate_size"
    folder = make_folder(tmp_path / "odd", kind, **{key: width})
    assert pool.run(check, folder, folder)[0] < 1e-4


def track(topology: Topology, folder: Path) -> list[bool]:
    """Record, for each forward pass of transformers, whether gradients were enabled."""
    from transformers import LlamaForCausalLM

    seen, forward = [], LlamaForCausalLM.forward

    def watched(model: Any, *args: Any, **more: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return forward(model, *args, **more)

    LlamaForCausalLM.forward = watched
    try:
        check(topology, folder, folder)
    finally:
        LlamaForCausalLM.forward = forward
    return seen


def test_nothing_is_recorded_for_a_gradient(pool: Pool, hf_folder: Callable[[str], Path]) -> None:
    [seen] = pool.run(track, hf_folder("llama"))
    assert seen and not any(seen)
