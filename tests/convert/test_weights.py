"""Weights are read as transformers reads them: files, tied matrices, dtypes; quantised ones are refused."""

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

from minitron_megatron.convert import folder_hash, load_hf, model_hash, read_config, save_hf
from minitron_megatron.convert.check import logits_of
from minitron_megatron.data import Batch
from minitron_megatron.errors import CheckpointError
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

from .conftest import make_folder
from .test_errors import with_config, with_tensors
from .test_round_trip import logits_of_transformers, some_tokens

HfFolder = Callable[[str], Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(hf_folder: HfFolder, tmp_path: Path) -> Path:
    """Return a copy of a good folder, to be changed."""
    return Path(shutil.copytree(hf_folder("llama"), tmp_path / "model"))


def through(topology: Topology, folder: Path, export: Path) -> tuple[Tensor | None, bool, bool]:
    """Return (logits, whether an export has the same ones, whether the model's hash equals its folder's)."""
    tokens, model = some_tokens(509), load_hf(folder, topology)
    batch = Batch(tokens, tokens, tokens >= 0)
    logits = logits_of(model, batch, topology)
    save_hf(model, export, topology)
    again = logits_of(load_hf(export, topology), batch, topology)
    same_hash = model_hash(model, topology) == folder_hash(folder)
    return logits, logits is None or torch.equal(logits, again), same_hash


def assert_as_transformers(pool: Pool, folder: Path, export: Path, **layout: Any) -> None:
    (logits, same_export, same_hash), *_ = pool.run(through, folder, export, **layout)
    torch.testing.assert_close(logits, logits_of_transformers(folder, some_tokens(509)), atol=1e-4, rtol=1e-4)
    assert same_export and same_hash


# ---- tied or not


def own_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].roll(1, 0).clone()


def same_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def head_alone(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


@pytest.mark.parametrize(("change", "tied"), [(own_head, False), (same_head, True), (head_alone, True)])
def test_two_matrices_are_tied_where_transformers_ties_them(
    pool: Pool, hf_folder: HfFolder, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], tied: bool
) -> None:
    folder = Path(shutil.copytree(hf_folder("llama-tied"), tmp_path / "model"))
    with_tensors(folder, change)
    assert read_config(folder).shape.tied is tied
    assert_as_transformers(pool, folder, tmp_path / "export", tp=2)
    written = load_file(tmp_path / "export" / "model.safetensors")
    assert (EMBEDDING in written, HEAD in written) == (True, not tied)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is tied


def test_a_config_without_weights_is_taken_at_its_word(folder: Path) -> None:
    with_config(folder, tie_word_embeddings=True)
    assert not read_config(folder).shape.tied
    for leave in (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), Path.unlink):
        leave(folder / "model.safetensors")
        assert read_config(folder).shape.tied


# ---- dtypes


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_mixed_dtypes_load_as_the_widest(pool: Pool, hf_folder: HfFolder, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(hf_folder(kind), tmp_path / "model"))
    narrow = ("k_proj", "up_proj", "embed", "norm", "gate_up_proj")
    with_tensors(folder, lambda tensors: tensors.update(
        {name: each.bfloat16() for name, each in tensors.items() if any(word in name for word in narrow)}
    ))  # fmt: skip
    with_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].half()}))
    assert_as_transformers(pool, folder, tmp_path / "export", tp=2)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.uint8], ids=str)
def test_quantised_weights_are_refused_by_name(folder: Path, dtype: torch.dtype) -> None:
    with_tensors(folder, lambda tensors: tensors.update({Q: tensors[Q].to(dtype)}))
    for read in (read_config, folder_hash):
        with pytest.raises(CheckpointError, match=rf"{Q} \(.*\) belongs to quantised weights, which cannot be read"):
            read(folder)


@pytest.mark.parametrize("name", [Q + "_scale_inv", Q.replace(".weight", ".input_scale"), Q + "_scale"])
def test_scales_of_quantised_weights_are_refused_by_name(folder: Path, name: str) -> None:
    with_config(folder, quantization_config={"quant_method": "fp8"})
    with_tensors(folder, lambda tensors: tensors.update({name: torch.ones(1, 1)}))
    with pytest.raises(CheckpointError, match=rf"{name} \(F32\) belongs to quantised weights"), pytest.warns():
        read_config(folder)


# ---- files


def shard(folder: Path, change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None) -> None:
    """Write the same tensors again, in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name].clone() for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_one_file_beside_an_index_of_the_same_tensors_is_read(folder: Path) -> None:
    alone = folder_hash(folder)
    shard(folder)
    assert folder_hash(folder) == alone
    (folder / "model.safetensors").unlink()
    assert folder_hash(folder) == alone


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({Q: tensors[Q] + 1}),
        lambda tensors: tensors.update({Q: tensors[Q][:4].clone()}),
        lambda tensors: tensors.pop(Q),
    ],
    ids=["values", "shape", "missing"],
)
def test_one_file_beside_an_index_of_other_tensors_is_an_error(folder: Path, change: Callable[..., Any]) -> None:
    shard(folder, change)
    for read in (folder_hash, read_config):  # an estimate reads the config alone
        with pytest.raises(CheckpointError, match=r"and their tensors differ\. Remove the stale one"):
            read(folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {Q: "../model.safetensors"}}, "names '../model.safetensors', which is not a file"),
        ({"weight_map": {Q: "/etc/passwd"}}, "names '/etc/passwd', which is not a file of its folder"),
        ({"weight_map": {Q: 3}}, "names 3, which is not a file of its folder"),
        ({"weight_map": {Q: ["a"]}}, "is damaged or not an index"),
        ({"weight_map": [Q]}, "is damaged or not an index"),
        ({"weight_map": None}, "is damaged or not an index"),
        ([1, 2], "is damaged or not an index"),
        ({"weight_map": {Q: "model-9.safetensors"}}, "model-9.safetensors is damaged or not a safetensors file"),
    ],
)
def test_an_index_that_is_none_is_one_message(folder: Path, index: Any, words: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        folder_hash(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_refused(folder: Path, alone: bool) -> None:
    (folder / "adapter_config.json").write_text("{}")
    if alone:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    said = (
        f"^{folder / 'adapter_config.json'} belongs to an adapter, which would change the model. Merge it "
        r"\(merge_and_unload of peft\), and give the folder of the merged model.$"
    )
    for read in (folder_hash, read_config):
        with pytest.raises(CheckpointError, match=said):
            read(folder)


def test_a_tensor_in_two_files_is_an_error(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2.safetensors and model-1.safetensors both hold "):
        folder_hash(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 4, "lacks the tensor model.layers.3.*num_hidden_layers: 4"),
        ("num_hidden_layers", 2, "does not have: model.layers.2.*num_hidden_layers: 2"),
        ("hidden_size", 44, "Check its vocab_size, hidden_size"),
        ("num_attention_heads", 8, "Check its num_attention_heads, num_key_value_heads, head_dim"),
        ("intermediate_size", 60, "Check its intermediate_size"),
        ("num_hidden_layers", 9999, "lacks the tensor model.layers.3"),
    ],
)
def test_tensors_that_do_not_fit_name_the_key(folder: Path, key: str, value: int, words: str) -> None:
    with_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=words):
        folder_hash(folder)


def test_a_missing_head_names_the_key(hf_folder: HfFolder, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama-tied")
    with_config(folder, tie_word_embeddings=False)
    with pytest.raises(
        CheckpointError, match=r"lacks the tensor lm_head.weight\. config.json says tie_word_embeddings: f"
    ):
        folder_hash(folder)
