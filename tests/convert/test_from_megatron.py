"""A Megatron checkpoint becomes the Hugging Face folder that it was made from, bit for bit, and nothing of it runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from minitron_megatron.convert import folder_hash, import_megatron, load_hf, local_folder, read_config, save_hf
from minitron_megatron.errors import MinitronError
from minitron_megatron.model import MegatronCheckpoint, Spec, build, fill_initial, named_shards, save_megatron_lm
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.engine import installed
from tests.model.test_megatron_lm import CONFIGS, LAYOUTS, SHAPE

KINDS = tuple(CONFIGS)


def write(topology: Topology, kind: str, folder: Path, spec: Spec = "local", dtype: str = "float32") -> None:
    """Write a random model in both formats."""
    config = CONFIGS[kind]
    with installed():
        chunks = build(config, topology, getattr(torch, dtype), spec=spec)
    fill_initial(chunks, topology, 1)
    save_megatron_lm(chunks, folder / "lm", topology)
    save_hf(chunks, folder / "hf", topology)


def same(topology: Topology, one: Path, other: Path) -> bool:
    """Return whether this rank's shards of two folders are equal in every bit."""
    ours, theirs = ({s.name: s.tensor for s in named_shards(load_hf(each, topology))} for each in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_hugging_face_folder(pool: Pool, kind: str, tmp_path: Path) -> None:
    pool.run(write, kind, tmp_path)
    import_megatron(tmp_path / "lm", tmp_path / "imported")
    assert read_config(tmp_path / "imported") == read_config(tmp_path / "hf")
    assert folder_hash(tmp_path / "imported") == folder_hash(tmp_path / "hf")


@pytest.mark.parametrize(
    ("kind", "written", "spec", "read"),
    [
        ("llama", "tp1", "local", "tp2-pp2"),
        ("qwen3", "tp2-sp", "te", "pp2"),
        ("nemotron", "pp2-vp2", "local", "tp2-sp"),
        ("qwen2_moe", "ep2", "te", "tp2-sp"),
        ("qwen3_moe", "tp2-sp", "local", "ep2"),
    ],
)
def test_written_at_one_layout_it_is_the_same_at_another(
    pool: Pool, kind: str, written: str, spec: Spec, read: str, tmp_path: Path
) -> None:
    layouts = LAYOUTS | {"tp2-pp2": {"tp": 2, "pp": 2}}
    pool.run(write, kind, tmp_path, spec, "bfloat16", **layouts[written])
    import_megatron(tmp_path / "lm" / "release", tmp_path / "imported")
    dtype = json.loads((tmp_path / "imported" / "config.json").read_text())["torch_dtype"]
    assert dtype == {"local": "bfloat16", "te": "float32"}[spec], "that of the norms of the stand-in for TE"
    assert all(pool.run(same, tmp_path / "imported", tmp_path / "hf", **layouts[read]))


# ---- arguments


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a Llama in both formats."""
    folder = tmp_path_factory.mktemp("saved")
    pool.run(write, "llama", folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """Copy of the checkpoint's iteration, to be changed."""
    return Path(shutil.copytree(saved / "lm" / "release", tmp_path / "iter"))


def change(checkpoint: Path, **arguments: Any) -> None:
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    common["args"] = Namespace(**vars(common["args"]) | arguments)
    torch.save(common, checkpoint / "common.pt")


class Backend(Enum):
    """Stand-in for the enums among Megatron-LM's arguments, which are not importable here."""

    AUTO = 1


def test_what_is_neither_number_nor_text_is_not_loaded_and_in_no_ones_way(checkpoint: Path, saved: Path) -> None:
    change(checkpoint, attention_backend=Backend.AUTO, params_dtype=torch.bfloat16, save=Path("somewhere"))
    arguments = MegatronCheckpoint(checkpoint).arguments
    assert not isinstance(arguments["attention_backend"], Backend)
    assert (arguments["num_layers"], arguments["params_dtype"]) == (SHAPE.layers, torch.bfloat16)
    assert read_config(local_folder(checkpoint)) == read_config(saved / "hf")


def test_the_tokenizer_says_the_vocabulary_where_the_arguments_do_not(checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint, vocab_size=None)
    with pytest.raises(MinitronError, match=r"do not say how many entries the tokenizer has. Give .*`tokenizer`"):
        local_folder(checkpoint)
    (tmp_path / "tokenizer").mkdir()
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(90)}, unk_token="w0")).save(
        str(tmp_path / "tokenizer" / "tokenizer.json")
    )
    import_megatron(checkpoint, tmp_path / "imported", tmp_path / "tokenizer")
    assert read_config(tmp_path / "imported").shape == replace(CONFIGS["llama"].shape, vocab=90)
    assert (tmp_path / "imported" / "tokenizer.json").is_file()
    change(checkpoint, vocab_size=None, tokenizer_model=str(tmp_path / "tokenizer"))
    assert read_config(local_folder(checkpoint)).shape.vocab == 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 5}, r"layer_norm_weight stacks \(4,\) layers and experts, but its arguments make it \(5,\)"),
        ({"num_layers": 3}, r"layer_norm_weight stacks \(4,\) layers and experts, but its arguments make it \(3,\)"),
        ({"num_layers": None}, "arguments do not say num_layers"),
        ({"ffn_hidden_size": 64}, r"linear_fc1.weight has shape \(96, 32\), but its arguments make it \(128, 32\)"),
        (
            {"untie_embeddings_and_output_weights": True},
            r"lacks the parameter output_layer\.weight, which its arguments ask for\. Copy the checkpoint again\.",
        ),
        ({"qk_layernorm": True}, "lacks the parameter decoder.layers.0.self_attention.q_layernorm.weight"),
        ({"swiglu": False}, "an activation other than --swiglu and --squared-relu"),
        (
            {"multi_latent_attention": True},
            r"has multi_latent_attention=True \(here it would be False\), which this package cannot express\.",
        ),
        ({"rotary_interleaved": True}, "has rotary_interleaved=True"),
        ({"position_embedding_type": "none", "use_rotary_position_embeddings": None}, "_embedding_type='none'"),
        ({"mtp_num_layers": 1}, "has mtp_num_layers=1"),
    ],
)  # fmt: skip
def test_another_model_than_the_arguments_say_is_refused_by_name(
    checkpoint: Path, arguments: dict[str, Any], message: str
) -> None:
    change(checkpoint, **arguments)
    with pytest.raises(MinitronError, match=message):
        local_folder(checkpoint)


def test_a_factor_that_pretrain_gpt_ignores_is_used_and_warned_of(checkpoint: Path) -> None:
    change(checkpoint, rope_scaling_factor=32.0)
    with pytest.warns(UserWarning, match=r"rope_scaling_factor: 32, .* was with 8"):
        scaling = MegatronCheckpoint(checkpoint).config().rotary_scaling
    assert scaling is not None and scaling["factor"] == 32


# ---- damage and malice


class Malice:
    """Object that runs a command when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *values: Any) -> None:
        self.call = function, values

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_no_pickle_of_a_checkpoint_runs(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    change(checkpoint, evil=Malice(eval, f"open({str(tmp_path / 'made')!r}, 'w')"))
    assert MegatronCheckpoint(checkpoint).arguments["num_layers"] == SHAPE.layers
    shutil.copy(saved / "lm" / "release" / "common.pt", checkpoint / "common.pt")
    change(checkpoint, evil=Malice(os.system, f"touch {tmp_path / 'made'}"))
    with pytest.raises(MinitronError, match=r"common.pt is damaged or not safe to open: it holds more than tensors"):
        MegatronCheckpoint(checkpoint).arguments
    for part in checkpoint.glob("*.distcp"):
        size = part.stat().st_size
        torch.save({"x": Malice(os.system, f"touch {tmp_path / 'made'}")}, part)
        part.open("ab").truncate(size)
    with pytest.raises(MinitronError, match="distcp is damaged or not safe to open"):
        MegatronCheckpoint(checkpoint).read("embedding.word_embeddings.weight")
    assert not (tmp_path / "made").exists()


def test_a_hostile_index_runs_nothing_and_reads_no_other_file(checkpoint: Path, tmp_path: Path) -> None:
    index = checkpoint / ".metadata"
    good = pickle.loads(index.read_bytes())
    for at, place in good.storage_data.items():
        good.storage_data[at] = replace(place, relative_path=f"../{place.relative_path}")
    index.write_bytes(pickle.dumps(good))
    with pytest.raises(MinitronError, match="the index has no plain place for embedding"):
        MegatronCheckpoint(checkpoint).read("embedding.word_embeddings.weight")
    index.write_bytes(pickle.dumps(Malice(os.system, f"touch {tmp_path / 'made'}")))
    with pytest.raises(MinitronError, match="is not the index of a checkpoint"):
        MegatronCheckpoint(checkpoint)
    index.write_bytes(index.read_bytes()[:20])
    with pytest.raises(MinitronError, match="is damaged or not safe to open"):
        MegatronCheckpoint(checkpoint)
    assert not (tmp_path / "made").exists()


def test_a_tokenizer_for_a_folder_that_has_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MinitronError) as caught:
        local_folder(tmp_path, Path("theirs"))
    assert str(caught.value) == (
        f"tokenizer is theirs, but {tmp_path} is not a Megatron checkpoint: its own is used. Remove tokenizer."
    )


def test_a_checkpoint_without_arguments_says_who_writes_them(checkpoint: Path) -> None:
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    del common["args"]
    torch.save(common, checkpoint / "common.pt")
    with pytest.raises(MinitronError) as caught:
        local_folder(checkpoint)
    assert str(caught.value) == (
        f"{checkpoint} has no arguments of Megatron-LM, so that its model is not known. Save it with Megatron-LM."
    )


def test_a_parameter_that_no_argument_describes_is_named(checkpoint: Path) -> None:
    index = checkpoint / ".metadata"
    good = pickle.loads(index.read_bytes())
    good.state_dict_metadata["decoder.gate"] = good.state_dict_metadata["decoder.final_layernorm.weight"]
    index.write_bytes(pickle.dumps(good))
    said = (
        f"{checkpoint} holds a parameter that its arguments do not describe: decoder.gate. Copy the checkpoint again, "
        "or give one of a model that the arguments describe."
    )
    with pytest.raises(MinitronError, match=f"^{re.escape(said)}$"):
        local_folder(checkpoint)


def test_other_formats_are_refused_with_what_converts_them(checkpoint: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
    (old / "latest_checkpointed_iteration.txt").write_text("100")
    with pytest.raises(
        MinitronError,
        match=r"iter_0000100 is not a distributed checkpoint\. Convert it with Megatron-LM: --ckpt-convert",
    ):
        local_folder(old)
    (old / "latest_checkpointed_iteration.txt").write_text("99")
    with pytest.raises(MinitronError, match=r"iteration.txt names iter_0000099, which is not there"):
        local_folder(old)
    (old / "latest_checkpointed_iteration.txt").write_text("../..")
    with pytest.raises(MinitronError, match=r"iteration.txt names no iteration: '../..'\. Give the folder of one\."):
        local_folder(old)
    (checkpoint / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(MinitronError, match=r"metadata\.json"):
        local_folder(checkpoint)
