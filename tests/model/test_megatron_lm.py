"""An exported Megatron-LM checkpoint loads with mcore's local and Transformer Engine specs, and its flags describe the
model."""

from __future__ import annotations

import pickle
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minitron_megatron.errors import CheckpointError
from minitron_megatron.layout import Shape
from minitron_megatron.model import (
    MegatronCheckpoint,
    ModelConfig,
    Spec,
    assign,
    build,
    check_megatron_lm,
    fill_initial,
    named_shards,
)
from minitron_megatron.model.megatron_flags import FLAGS, megatron_lm_flags
from minitron_megatron.model.megatron_lm import _new as new_folder
from minitron_megatron.model.megatron_lm import save_megatron_lm
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.engine import installed

SHAPE = Shape(layers=4, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=100)
EXPERTS: dict[str, Any] = {"ffn": 0, "experts": 4, "experts_per_token": 2, "expert_ffn": 24}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CONFIGS = {
    "llama": ModelConfig(replace(SHAPE, tied=True), rotary_scaling=LLAMA3),
    "mistral": ModelConfig(SHAPE, window=9),
    "qwen2": ModelConfig(replace(SHAPE, qkv_bias=True), norm_eps=1e-6),
    "qwen3": ModelConfig(replace(SHAPE, qk_norm=True), norm_eps=1e-6),
    "nemotron": ModelConfig(
        replace(SHAPE, gated=False, norm_bias=True),
        norm="LayerNorm", zero_centered_norm=True, activation="relu2", rotary_share=0.5,
    ),
    "mixtral": ModelConfig(replace(SHAPE, **EXPERTS)),
    "qwen2_moe": ModelConfig(replace(SHAPE, **EXPERTS, qkv_bias=True, shared_ffn=16, shared_gate=True)),
    "qwen3_moe": ModelConfig(replace(SHAPE, **EXPERTS, qk_norm=True)),
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-vp2": {"pp": 2, "vp": 2},
    "ep2": {"dp": 2, "ep": 2},
}


def write(topology: Topology, config: ModelConfig, spec: Spec, folder: Path) -> None:
    with installed():
        chunks = build(config, topology, spec=spec)
    fill_initial(chunks, topology, 1)
    save_megatron_lm(chunks, folder, topology)


def read(topology: Topology, config: ModelConfig, spec: Spec, folder: Path) -> tuple[bool, list[str]]:
    """Load with mcore only; return whether every weight equals that of `write`, and the keys that the spec requires."""
    from megatron.core import dist_checkpointing

    with installed():
        chunks = build(config, topology, spec=spec)
        wanted = build(config, topology)
    fill_initial(wanted, topology, 1)
    for shard in named_shards(chunks):
        assign(shard, torch.full(shard.tensor.shape, torch.nan))
    asked = {f"model{number}": chunk.sharded_state_dict(metadata={}) for number, chunk in enumerate(chunks)}
    keys = sorted({tensor.key for each in asked.values() for tensor in each.values()})
    loaded = dist_checkpointing.load(asked, str(folder / "release"), strict="raise_unexpected")
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"], strict=True)
    got = {(shard.name, shard.tied_copy): shard.tensor for shard in named_shards(chunks)}
    want = {(shard.name, shard.tied_copy): shard.tensor for shard in named_shards(wanted)}
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got), keys


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_of_megatrons_specs_find_all_their_keys(pool: Pool, kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    mixture = bool(config.shape.experts)
    pool.run(write, config, "local", tmp_path / "out")
    for spec in ("local", "te"):
        [(same, keys)] = pool.run(read, config, spec, tmp_path / "out")
        assert same
        assert ("decoder.layers.pre_mlp_layernorm.weight" in keys) == (mixture and spec == "te")
        assert ("decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys) == (not mixture or spec == "local")
        assert ("decoder.final_layernorm._extra_state" in keys) == (spec == "te")
        assert ("decoder.layers.self_attention.q_layernorm._extra_state" in keys) == (
            config.shape.qk_norm and spec == "te"
        )


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize("written", ["local", "te"])
def test_a_mixture_loads_at_another_layout_and_spec(pool: Pool, layout: str, written: Spec, tmp_path: Path) -> None:
    config = CONFIGS["qwen3_moe"]
    pool.run(write, config, written, tmp_path / "out", **LAYOUTS[layout])
    for spec in ("local", "te"):
        assert all(same for same, _ in pool.run(read, config, spec, tmp_path / "out", **LAYOUTS["tp2-sp"]))


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_tp2_pp2_writes_the_same_checkpoint_as_one_rank(pool: Pool, kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    pool.run(write, config, "local", tmp_path / "one")
    pool.run(write, config, "local", tmp_path / "four", tp=2, pp=2, sequence_parallel=True)
    one, four = (MegatronCheckpoint(tmp_path / each) for each in ("one", "four"))
    assert keys_of(one) == keys_of(four)
    assert (tmp_path / "one" / FLAGS).read_text() == (tmp_path / "four" / FLAGS).read_text()
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    assert {**one.arguments, **layout} == four.arguments
    for name in config.shape.names():
        assert torch.equal(one.read(name), four.read(name)), name


def keys_of(checkpoint: MegatronCheckpoint) -> set[str]:
    """Return the keys of tensors and objects in the index of a checkpoint that these tests wrote."""
    return set(pickle.loads((checkpoint.folder / ".metadata").read_bytes()).state_dict_metadata)


# ---- flags


ALWAYS = {"--use-checkpoint-args", "--exit-on-missing-checkpoint", "--ckpt-format", "--norm-epsilon"}
EXPECTED = {
    "llama": {"--use-rope-scaling"},
    "mistral": {"--window-size"},
    "qwen3": {"--qk-layernorm"},
    "nemotron": {"--apply-layernorm-1p"},
    "qwen2_moe": {"--moe-shared-expert-gate"},
    "qwen3_moe": {"--qk-layernorm"},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_flags_say_what_the_checkpoint_args_do_not(kind: str) -> None:
    flags = megatron_lm_flags(CONFIGS[kind], torch.float32)
    assert {flag for flag, *_ in flags} == ALWAYS | EXPECTED.get(kind, set())
    assert ("--norm-epsilon", repr(CONFIGS[kind].norm_eps)) in flags
    assert kind != "mistral" or ("--window-size", "8,0") in flags
    assert ("--bf16",) in megatron_lm_flags(CONFIGS[kind], torch.bfloat16)


def test_the_script_beside_the_checkpoint_sets_them_wherever_it_lies(pool: Pool, tmp_path: Path) -> None:
    config, moved = CONFIGS["qwen3"], tmp_path / "it's moved; echo $HOME"
    pool.run(write, config, "local", tmp_path / "out")
    (tmp_path / "out").rename(moved)
    shown = subprocess.run(
        ["bash", "-c", f'cd /; source "$1/{FLAGS}" && printf "%s\\n" "${{MEGATRON_ARGS[@]}}"', "bash", str(moved)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    flags = [word for flag in megatron_lm_flags(config, torch.float32) for word in flag]
    assert shown.stdout.splitlines() == ["--load", str(moved), *flags]
    odd = Path("a b/$(touch x)'`id`\nmodel")
    words = [word for flag in megatron_lm_flags(config, torch.float32, odd) for word in flag]
    assert words[-2:] == ["--tokenizer-model", str(odd)]


ONLY_LLAMA3 = (
    r"rope_type 'linear': its pretrain_gpt\.py scales rotary embeddings only as llama3 does\. Leave --format out for a "
    r"Hugging Face folder, or build the model in your own script\.$"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_scaling": {"rope_type": "linear", "factor": 2.0}}, ONLY_LLAMA3),
        ({"rotary_scaling": LLAMA3 | {"factor": 32.0}}, "factor: 32.0 of rope_type 'llama3': its pretrain"),
        ({"rotary_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor: 2.0"),
        ({"rotary_scaling": LLAMA3 | {"high_freq_factor": 8.0}}, "high_freq_factor: 8.0"),
        ({"rotary_scaling": LLAMA3 | {"original_max_position_embeddings": 4096}}, "original_max_.*: 4096"),
        ({"activation": "relu2"}, "activation relu2 with a gate"),
        ({"shape": replace(SHAPE, gated=False)}, "activation silu without a gate"),
    ],
)  # fmt: skip
def test_what_no_flag_expresses_is_refused_by_name(pool: Pool, changes: dict, message: str, tmp_path: Path) -> None:
    check_megatron_lm(CONFIGS["llama"])
    config = replace(ModelConfig(SHAPE), **changes)
    with pytest.raises(CheckpointError, match=rf"^Megatron-LM cannot express {message}"):
        pool.run(write, config, "local", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CheckpointError) as caught, new_folder(tmp_path, Topology()):
        pass
    assert str(caught.value) == f"{tmp_path} exists and is not an empty folder. Give another one."
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    first: Any = SimpleNamespace(rank=0)
    with pytest.raises(CheckpointError) as caught, new_folder(tmp_path / "notes" / "new", first):
        pass
    assert str(caught.value) == f"{tmp_path}/notes/new cannot be written: Not a directory. Give another folder."
