"""An export is a folder that old and new transformers read as the same model; a failed export leaves nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.convert import flat_config, load_hf, read_config, save_hf, weights
from minitron_megatron.errors import CheckpointError
from minitron_megatron.events import Event
from minitron_megatron.model import build, fill_initial
from minitron_megatron.model.config import rotary_frequencies
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

from .conftest import KINDS, LLAMA3, SIZES
from .test_round_trip import assert_same_bytes, logits_of_transformers, some_tokens, tensors_of

HfFolder = Callable[[str], Path]


def export(topology: Topology, source: Path, target: Path, **options: Any) -> None:
    save_hf(load_hf(source, topology), target, topology, **options)


def export_with(topology: Topology, source: Path, target: Path, options: dict[str, Any]) -> None:
    export(topology, source, target, **options)


def loss_of_transformers(folder: Path) -> float:
    tokens = some_tokens(509)
    logits = logits_of_transformers(folder, tokens)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_loss_of_its_source(pool: Pool, hf_folder: HfFolder, tmp_path: Path, kind: str) -> None:
    pool.run(export_with, hf_folder(kind), tmp_path / "out", {}, tp=2, sequence_parallel=True)
    assert loss_of_transformers(tmp_path / "out") == pytest.approx(loss_of_transformers(hf_folder(kind)), rel=1e-5)


def export_to_a_full_disk(topology: Topology, source: Path, target: Path) -> str:
    """Return this rank's error when rank 0's disk is full after some tensors."""
    written, add = 0, weights.SafetensorsWriter.add

    def limited(writer: Any, *tensor: Any) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(writer, *tensor)

    weights.SafetensorsWriter.add = limited  # type: ignore[method-assign]
    try:
        export(topology, source, target)
    except CheckpointError as error:
        return str(error)
    finally:
        weights.SafetensorsWriter.add = add  # type: ignore[method-assign]
    return ""


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
def test_a_full_disk_is_one_error_on_every_rank(
    pool: Pool, hf_folder: HfFolder, tmp_path: Path, layout: dict[str, int]
) -> None:
    first, second = pool.run(export_to_a_full_disk, hf_folder("llama"), tmp_path / "out", **layout)
    assert first == second and "out cannot be written: [Errno 28] No space left on device. Make room" in first
    assert not list(tmp_path.iterdir())


# ---- config.json


def test_the_config_is_flat_as_transformers_4_wants_it(pool: Pool, hf_folder: HfFolder, tmp_path: Path) -> None:
    source = hf_folder("llama")
    assert "rope_parameters" in json.loads((source / "config.json").read_text()), "the source is of transformers 5"
    pool.run(export_with, source, tmp_path / "out", {})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert {key: config[key] for key in SIZES} == SIZES
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == LLAMA3
    assert config["torch_dtype"] == "float32"
    assert not {"rope_parameters", "dtype", "transformers_version", "layer_types", "_name_or_path"} & config.keys()


def test_the_config_says_what_was_pruned(hf_folder: HfFolder) -> None:
    config = read_config(hf_folder("mistral")).resized(layers=2, hidden=24, ffn=8, heads=2, kv_groups=1)
    flat = flat_config(config, "bfloat16")
    pruned = {
        "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "torch_dtype": "bfloat16", "rope_scaling": None, "rope_theta": 1000.0, "sliding_window": None,
        "architectures": ["MistralForCausalLM"],
    }  # fmt: skip
    assert {key: flat[key] for key in pruned} == pruned


@pytest.mark.parametrize(
    ("nested", "flat"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, {"rope_theta": 1e6, "rope_scaling": None}),
    ],
)
def test_configs_of_transformers_4_and_5_read_alike(
    tmp_path: Path, nested: dict[str, Any], flat: dict[str, Any]
) -> None:
    configs = []
    for number, rope in enumerate((nested, flat)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **rope}))
        configs.append(read_config(folder))
    assert configs[0] == configs[1]
    (folder / "config.json").write_text(json.dumps(flat_config(configs[0], "float32")))
    assert read_config(folder) == configs[0]


@pytest.mark.parametrize("keys", [{}, {"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 1.0}])
def test_nemotron_rotates_the_share_that_transformers_rotates(tmp_path: Path, keys: dict[str, float]) -> None:
    from transformers import AutoConfig
    from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

    sizes = {key: value for key, value in SIZES.items() if key != "rms_norm_eps"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nemotron", "norm_eps": 1e-5, **sizes, **keys}))
    for _ in ("as it came", "as it leaves"):
        config = read_config(tmp_path)
        reference = NemotronRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq
        torch.testing.assert_close(rotary_frequencies(config), reference)
        (tmp_path / "config.json").write_text(json.dumps(flat_config(config, "float32")))
    assert len(reference) == 16 / 2 * keys.get("partial_rotary_factor", 0.5)


def test_head_dim_and_groups_follow_from_the_heads_where_a_config_is_silent(tmp_path: Path) -> None:
    hf = {"model_type": "llama", **SIZES}
    del hf["head_dim"], hf["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    shape = read_config(tmp_path).shape
    assert (shape.head_dim, shape.kv_groups) == (10, 4)
    assert flat_config(read_config(tmp_path), "float32")["head_dim"] == 10


# ---- files


def test_a_model_in_several_files_loads_in_transformers(pool: Pool, hf_folder: HfFolder, tmp_path: Path) -> None:
    source, out = hf_folder("llama"), tmp_path / "out"
    limit = 20_000
    pool.run(export_with, source, out, {"file_bytes": limit}, pp=2)
    want = tensors_of(source)
    assert_same_bytes(tensors_of(out), want)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 5
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    for file in files:
        inside = [name for name, at in index["weight_map"].items() if at == file]
        assert len(inside) == 1 or sum(want[name].nbytes for name in inside) <= limit
    assert loss_of_transformers(out) == pytest.approx(loss_of_transformers(source), rel=1e-5)
    pool.run(export_with, out, tmp_path / "again", {}, tp=2)
    assert [path.name for path in (tmp_path / "again").glob("*safetensors*")] == ["model.safetensors"]
    assert_same_bytes(tensors_of(tmp_path / "again"), want)


def export_first_weights(topology: Topology, source: Path, target: Path) -> None:
    model = build(read_config(source), topology)
    fill_initial(model, topology, seed=3)
    save_hf(model, target, topology)


def test_a_model_that_was_never_loaded_exports_alike_at_every_layout(
    pool: Pool, hf_folder: HfFolder, tmp_path: Path
) -> None:
    outs = []
    for layout in ({"tp": 1}, {"tp": 2}, {"pp": 2}, {"dp": 2}):
        outs.append(tmp_path / str(len(outs)))
        pool.run(export_first_weights, hf_folder("mistral-tied"), outs[-1], **layout)
    for out in outs[1:]:
        assert_same_bytes(tensors_of(out), tensors_of(outs[0]))


# ---- whole or absent


class DiskFullError(Exception):
    pass


def fail_at_the_third(event: Event) -> None:
    if event.done == 3:
        raise DiskFullError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failing_export_leaves_nothing_behind(pool: Pool, hf_folder: HfFolder, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError):
        pool.run(export_with, hf_folder("llama"), tmp_path / "out", {"listener": fail_at_the_third})
    assert list(tmp_path.iterdir()) == []


def test_a_failing_export_leaves_the_old_one_as_it_was(pool: Pool, hf_folder: HfFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pool.run(export_with, hf_folder("llama"), out, {})
    before = contents(out)
    with pytest.raises(DiskFullError):
        pool.run(export_with, hf_folder("mistral"), out, {"listener": fail_at_the_third})
    assert contents(out) == before
    pool.run(export_with, hf_folder("mistral"), out, {})
    assert contents(out) != before
    assert list(tmp_path.iterdir()) == [out]


def test_the_listener_hears_of_every_tensor(pool: Pool, hf_folder: HfFolder, tmp_path: Path) -> None:
    [events] = pool.run(export_and_listen, hf_folder("llama"), tmp_path / "out")
    count = len(tensors_of(hf_folder("llama")))
    assert [event.done for event in events if event.label == "export"] == list(range(1, count + 1))
    assert {event.total for event in events if event.label == "export"} == {count}


def export_and_listen(topology: Topology, source: Path, target: Path) -> list[Event]:
    events: list[Event] = []
    export(topology, source, target, listener=events.append)
    return events
