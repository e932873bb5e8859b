"""A model's hash depends on its weights and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_megatron.convert import folder_hash, load_hf, model_hash, save_hf
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

from .conftest import make_folder
from .test_round_trip import LAYOUTS

HfFolder = Callable[[str], Path]


def loaded_hash(topology: Topology, folder: Path, dtype: torch.dtype) -> str:
    return model_hash(load_hf(folder, topology, dtype), topology)


@pytest.mark.parametrize("kind", ["llama", "mistral-tied", "mixtral"])
def test_the_hash_is_the_same_at_every_layout_and_that_of_the_folder(
    pool: Pool, hf_folder: HfFolder, kind: str
) -> None:
    hashes = {folder_hash(hf_folder(kind))}
    layouts = ("tp1", "tp2-sp", *(("ep2-pp2", "ep2-tp2") if kind == "mixtral" else ("tp2-pp2",)))
    for layout in (*(LAYOUTS[name] for name in layouts), {"dp": 2}):
        hashes.update(pool.run(loaded_hash, hf_folder(kind), torch.float32, **layout))
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64


def split(topology: Topology, source: Path, target: Path) -> None:
    save_hf(load_hf(source, topology), target, topology, file_bytes=20_000)


def test_neither_the_split_into_files_nor_an_upcast_changes_it(pool: Pool, tmp_path: Path) -> None:
    half = make_folder(tmp_path / "half", "llama", torch.bfloat16)
    pool.run(split, half, tmp_path / "upcast and split")
    assert len(list((tmp_path / "upcast and split").glob("*.safetensors"))) > 1
    hashes = {folder_hash(half), folder_hash(tmp_path / "upcast and split")}
    for dtype in (torch.bfloat16, torch.float32):
        hashes.update(pool.run(loaded_hash, half, dtype))
    assert len(hashes) == 1


def one_value(tensors: dict[str, Tensor]) -> None:
    value = tensors["model.norm.weight"][7]
    tensors["model.norm.weight"][7] = torch.nextafter(value, torch.tensor(torch.inf))


def swapped(tensors: dict[str, Tensor]) -> None:
    q, r = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    tensors[q], tensors[r] = tensors[r], tensors[q]


def two_rows(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"][:2] = tensors["lm_head.weight"][:2].flip(0)


@pytest.mark.parametrize("change", [one_value, swapped, two_rows])
def test_any_change_of_a_value_or_its_place_changes_it(
    tmp_path: Path, hf_folder: HfFolder, change: Callable[[dict[str, Tensor]], None]
) -> None:
    tensors = load_file(hf_folder("llama") / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((hf_folder("llama") / "config.json").read_bytes())
    assert folder_hash(tmp_path) != folder_hash(hf_folder("llama"))
