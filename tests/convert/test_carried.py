"""Exports copy every file that transformers' tokenizers and generation read, but neither weights nor code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from minitron_megatron.convert import carried_files, carry, load_hf, save_hf, stop_at
from minitron_megatron.errors import CheckpointError, FileError
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

CARRIED = {
    "tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "spiece.model", "tiktoken.model", "qwen.tiktoken", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja", "generation_config.json",
}  # fmt: skip
LEFT = {
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "consolidated.00.pth",
    "model.gguf", "optimizer.pt", "training_args.bin", "README.md", "tokenization_own.py", "modeling_own.py",
    "adapter_config.json", "hf_quant_config.json", "params.json", "additional_chat_templates/run.py",
    "original/tokenizer.model",
}  # fmt: skip


def fill(folder: Path, names: set[str]) -> Path:
    for number, name in enumerate(sorted(names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}" if name == "tokenizer_config.json" else bytes([number, 0, 255]))
    return folder


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def export(topology: Topology, source: Path, files_from: Path, target: Path) -> None:
    save_hf(load_hf(source, topology), target, topology, files_from=files_from)


def test_tokenizer_and_generation_files_go_along_and_nothing_else(
    pool: Pool, hf_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = fill(tmp_path / "source", CARRIED | LEFT), tmp_path / "out"
    assert {str(path.relative_to(source)) for path in carried_files(source)} == CARRIED
    pool.run(export, hf_folder("llama"), source, out)
    assert names_in(out) == CARRIED | {"config.json", "model.safetensors"}
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in CARRIED)


def test_no_vocabulary_file_of_any_tokenizer_in_transformers_is_left(tmp_path: Path) -> None:
    named = set()
    for file in Path(transformers.__file__).parent.glob("models/*/*.py"):
        for body in re.findall(r"VOCAB_FILES_NAMES\b[^=\n]*=\s*\{(.*?)\}", file.read_text(), re.DOTALL):
            named |= set(re.findall(r""":\s*["']([^"']+)["']""", body))
    assert {"spiece.model", "vocab.txt", "merges.txt"} < named and len(named) > 20
    folder = fill(tmp_path, named)
    assert {path.name for path in carried_files(folder)} == named


def test_links_of_a_download_cache_are_followed_and_contents_copied(tmp_path: Path) -> None:
    blob, source, target = tmp_path / "blobs" / "abc", tmp_path / "snapshot", tmp_path / "out"
    fill(blob.parent, {"abc"})
    source.mkdir()
    target.mkdir()
    (source / "tokenizer.json").symlink_to(blob)
    (source / "additional_chat_templates").symlink_to(fill(tmp_path / "templates", {"a.jinja"}))
    (source / "vocab.json").mkdir()
    os.mkfifo(source / "merges.txt")
    carry(source, target)
    assert names_in(target) == {"tokenizer.json", "additional_chat_templates/a.jinja"}
    assert not any(path.is_symlink() for path in target.rglob("*"))
    assert (target / "tokenizer.json").read_bytes() == blob.read_bytes()


def test_a_link_to_nothing_is_one_error_on_every_rank(
    pool: Pool, hf_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "tekken.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/tekken\.json is a broken link\. Download the file again\."):
        pool.run(export, hf_folder("llama"), tmp_path, tmp_path / "out", pp=2)
    assert not (tmp_path / "out").exists()


def test_code_that_stays_behind_is_not_named_by_the_tokenizer(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    settings = {"eos_token": "</s>", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    carry(source, target)
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text("{torn")
    with pytest.raises(FileError, match=r"tokenizer_config\.json is not JSON"):
        carry(source, target)


@pytest.mark.parametrize(
    ("settings", "ends"),
    [(None, [1, 4]), ({"eos_token_id": 4, "top_p": 0.5}, [4, 1]), ({"eos_token_id": [7]}, [7, 1, 4])],
)
def test_ends_are_added_to_those_of_generation(tmp_path: Path, settings: object, ends: list[int]) -> None:
    path = tmp_path / "generation_config.json"
    if settings is not None:
        path.write_text(json.dumps(settings))
    stop_at(tmp_path, [4, 1])
    assert json.loads(path.read_text()) == (settings or {}) | {"eos_token_id": ends}  # type: ignore[operator]


@pytest.mark.parametrize("text", ["[1]", '{"eos_token_id": "four"}', "{"])
def test_generation_settings_that_are_none_are_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(FileError, match=r"generation_config\.json"):
        stop_at(tmp_path, [4])
