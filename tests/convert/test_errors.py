"""A folder that cannot be loaded is refused early, on every rank, by a message that names the problem."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_megatron.convert import folder_hash, load_hf
from minitron_megatron.errors import CheckpointError, MinitronError
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

from .conftest import make_folder

HfFolder = Callable[[str], Path]


@pytest.fixture
def folder(hf_folder: HfFolder, tmp_path: Path) -> Path:
    """Return a copy of a good folder, to be spoilt."""
    return Path(shutil.copytree(hf_folder("llama"), tmp_path / "model"))


def try_to_load(topology: Topology, *folders: Path) -> str:
    """Return the error of this rank on its folder; ranks beyond the list take the last folder."""
    try:
        load_hf(folders[min(topology.rank, len(folders) - 1)], topology)
    except CheckpointError as error:
        return f"CheckpointError: {error}"
    except MinitronError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def with_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


def no_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    return "there is no such folder"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "it has no config.json"


def not_json(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "is not JSON"


def unknown_family(folder: Path) -> str:
    with_config(folder, model_type="lama")
    return "model_type 'lama' is not supported. Did you mean 'llama'? Known: llama, mistral,"


def no_family(folder: Path) -> str:
    with_config(folder, model_type="gone")
    return "the config does not say model_type."


def attention_bias(folder: Path) -> str:
    with_config(folder, model_type="mistral", sliding_window=None, attention_bias=True)
    return "says attention_bias: True, which is not supported"


def missing_bias(folder: Path) -> str:
    with_config(folder, attention_bias=True)
    return "lacks the tensor model.layers.0.self_attn.q_proj.bias."


def activation(folder: Path) -> str:
    with_config(folder, hidden_act="gelu")
    return "says hidden_act: 'gelu', which is not supported; only 'silu' is."


def other_rope(folder: Path) -> str:
    with_config(folder, rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0})
    return "says rope_type: 'yarn', which is not supported"


def silent_config(folder: Path) -> str:
    with_config(folder, hidden_size="gone")
    return "does not say 'hidden_size'. A llama config must."


def incomplete_rope(folder: Path) -> str:
    with_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0})
    return "lacks 'low_freq_factor'"


def missing_tensor(folder: Path) -> str:
    with_tensors(folder, lambda tensors: tensors.pop(Q))
    return f"lacks the tensor {Q}."


def renamed_tensor(folder: Path) -> str:
    with_tensors(folder, lambda tensors: tensors.update({Q.replace("q_proj", "q"): tensors.pop(Q)}))
    return f"lacks the tensor {Q}. Did you mean '{Q.replace('q_proj', 'q')}'?"


def surplus_tensor(folder: Path) -> str:
    with_tensors(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}))
    return "holds a tensor that the model does not have: model.layers.1.self_attn.q_proj.bias."


def misshapen_tensor(folder: Path) -> str:
    with_tensors(folder, lambda tensors: tensors.update({Q: torch.zeros(60, 40)}))
    return f"{Q} has shape (60, 40), but config.json makes it (64, 40)."


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "has no model.safetensors and no model.safetensors.index.json"


def truncated_weights(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "model.safetensors is damaged or not a safetensors file"


def no_safetensors(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    return "model.safetensors is damaged or not a safetensors file"


def missing_file(folder: Path) -> str:
    weight_map = {name: "model-00001-of-00002.safetensors" for name in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return "model-00001-of-00002.safetensors is damaged or not a safetensors file"


def torn_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')
    return "model.safetensors.index.json is damaged"


def empty_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json is damaged"


SPOILS = [
    no_folder, no_config, not_json, unknown_family, no_family, attention_bias, missing_bias, activation,
    other_rope, silent_config, incomplete_rope, missing_tensor, renamed_tensor, surplus_tensor, misshapen_tensor,
    no_weights, truncated_weights, no_safetensors, missing_file, torn_index, empty_index,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_folder_is_refused_and_named(pool: Pool, folder: Path, spoil: Callable[[Path], str]) -> None:
    words = spoil(folder)
    [raised] = pool.run(try_to_load, folder)
    assert raised.startswith("CheckpointError: ")
    assert words in raised
    assert str(folder) in raised or "model_type" in words
    assert raised.count(". ") <= 2  # at most three sentences


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
@pytest.mark.parametrize("spoil", [truncated_weights, missing_tensor, no_folder], ids=lambda spoil: spoil.__name__)
def test_what_one_rank_meets_all_ranks_raise(
    pool: Pool, hf_folder: HfFolder, folder: Path, layout: dict[str, int], spoil: Callable[[Path], str]
) -> None:
    words = spoil(folder)
    for folders in [(folder,), (hf_folder("llama"), folder), (folder, hf_folder("llama"))]:
        first, second = pool.run(try_to_load, *folders, **layout)
        assert first == second
        assert first.startswith("CheckpointError: ") and words in first


def test_a_layout_that_does_not_fit_is_refused_by_all(pool: Pool, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama", num_key_value_heads=1)
    first, second = pool.run(try_to_load, folder, tp=2)
    assert first == second
    assert first.startswith("TopologyError: axis kv_groups has 1 unit, which cannot be split over TP=2.")


@pytest.mark.parametrize("spoil", [missing_tensor, truncated_weights, no_config], ids=lambda spoil: spoil.__name__)
def test_a_spoilt_folder_has_no_hash(folder: Path, spoil: Callable[[Path], str]) -> None:
    words = spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        folder_hash(folder)
    assert words in str(caught.value)


def test_leftovers_that_change_nothing_are_let_pass(pool: Pool, hf_folder: HfFolder, folder: Path) -> None:
    with_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    )
    assert pool.run(try_to_load, folder) == ["nothing"]
    assert folder_hash(folder) == folder_hash(hf_folder("llama"))
