"""Fuzzing of every reader: it gives a result or a MinitronError, and nothing else."""

from __future__ import annotations

import json
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitron_megatron.data import Corpus, check_tokenizer, prepare, text_files
from minitron_megatron.data.cache import _check_array
from minitron_megatron.data.document import Fields
from minitron_megatron.data.readers import documents
from minitron_megatron.data.token_files import find_token_files
from minitron_megatron.errors import MinitronError

bounded = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**30])
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from(["text", "", "w1", "<end>", "\ud83d", "\ufeff", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "content", "eos_token", "auto_map", "", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@contextmanager
def only_ours() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except MinitronError as error:
            assert str(error).strip() and len(str(error)) < 2000


def spoilt(whole: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for `whole` with a few bytes overwritten, cut off, or appended."""

    def spoil(at: int, new: bytes, end: int) -> bytes:
        return (whole[:at] + new + whole[at + len(new) :])[:end]

    place = st.integers(0, len(whole))
    return st.builds(spoil, place, st.binary(max_size=9), st.one_of(st.just(2 * len(whole)), place)) | st.binary(
        max_size=99
    )


line = st.one_of(
    anything.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.just("text"), anything).map(lambda value: json.dumps(value).encode()),
    st.sampled_from(
        [b'{"text": "w1"}', b"\xef\xbb\xbf", b"\xff\xfe{\0", b"<|endoftext|>", b"[" * 3000, b'{"a":' * 3000]
    ),
    st.binary(max_size=20),
)


@bounded
@given(st.lists(line, max_size=4).map(b"\n".join), st.sampled_from(["a.jsonl", "a.TXT"]), st.sampled_from(["text", ""]))
def test_text(content: bytes, name: str, key: str) -> None:
    with tempfile.TemporaryDirectory() as folder, only_ours():
        (Path(folder) / name).write_bytes(content)
        for document in documents(Path(folder) / name, Fields(key)):
            document.text.encode()  # must be valid UTF-8 for tokenizers


@bounded
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=9), max_size=4))
def test_names_of_files(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, only_ours():
        for name in ["1.jsonl", *(name for name in names if name not in (".", ".."))]:
            (Path(folder) / name).write_text('{"text": "w1"}')
        assert len(text_files([folder])) > 0


@bounded
@given(
    file=st.sampled_from(["tokenizer_config", "generation_config", "config", "special_tokens_map"]),
    key=st.sampled_from(["eos_token", "eos_token_id", "auto_map"]),
    value=anything,
    bare=st.booleans(),
)
def test_settings_of_a_tokenizer(file: str, key: str, value: Any, bare: bool, tokenizer: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, only_ours():
        (Path(folder) / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
        (Path(folder) / f"{file}.json").write_text(json.dumps(value if bare else {key: value}))
        check_tokenizer(folder, 3001)


def test_files_of_a_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    whole = json.loads((tokenizer / "tokenizer.json").read_text())
    whole["model"]["vocab"] = {"<end>": 0, "w1": 1}
    whole["post_processor"] = None
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "w1 w2"}')
    parts = ("added_tokens", "normalizer", "pre_tokenizer", "model", "truncation")

    @bounded
    @given(
        spoilt(json.dumps(whole).encode())
        | st.builds(lambda part, value: json.dumps(whole | {part: value}).encode(), st.sampled_from(parts), anything)
        | st.builds(
            lambda key, value: json.dumps(whole | {"model": whole["model"] | {key: value}}).encode(),
            st.sampled_from(["type", "vocab", "unk_token"]),
            anything,
        )
    )
    def read(content: bytes) -> None:
        (tmp_path / "tokenizer.json").write_bytes(content)
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
        with only_ours():
            prepare([source], tmp_path, tmp_path / "out", validation=0, vocab=2)

    read()


def test_files_of_a_pair(corpora: tuple[str, str], tmp_path: Path) -> None:
    kinds = {kind: Path(f"{corpora[0]}.train.{kind}").read_bytes() for kind in ("idx", "bin", "json")}
    head = struct.Struct("<9sQBQQ")
    counts = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 32, 33, 2**31, 2**62])

    def headed(version: int, code: int, sequences: int, ends: int) -> bytes:
        return head.pack(b"MMIDIDX\0\0", version, code, sequences, ends) + kinds["idx"][head.size :]

    hostile = st.builds(headed, st.integers(0, 2), st.integers(0, 9), counts, counts)

    def run(kind: str, contents: st.SearchStrategy[bytes], known: bool) -> None:
        @bounded
        @given(contents)
        def read(content: bytes) -> None:
            for name, whole in kinds.items():
                (tmp_path / f"a.train.{name}").write_bytes(content if name == kind else whole)
            if not known:
                (tmp_path / "a.train.json").unlink()
            with only_ours():
                find_token_files(tmp_path / "a", "train")
                corpus = Corpus([(tmp_path / "a", 1.0)], sequence=8, samples=9, seed=0, cache=tmp_path / "cache")
                assert [len(corpus[i][0]) for i in range(9)] == [8] * 9

        read()

    run("idx", spoilt(kinds["idx"]) | hostile, known=False)
    run("bin", spoilt(kinds["bin"]), known=False)
    run("json", spoilt(kinds["json"]) | anything.map(lambda value: json.dumps(value).encode()), known=True)


def test_files_of_an_index(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "a.npy", np.arange(30, dtype=np.int32).reshape(15, 2))
    whole = (tmp_path / "a.npy").read_bytes()

    def header(value: Any) -> bytes:
        text = repr(value).encode("utf-8", "replace")
        return whole[:8] + len(text).to_bytes(2, "little") + text + bytes(120)

    @bounded
    @given(spoilt(whole) | anything.map(header))
    def read(content: bytes) -> None:
        (tmp_path / "a.npy").write_bytes(content)
        with only_ours():
            _check_array(tmp_path / "a.npy")
            assert np.load(tmp_path / "a.npy", allow_pickle=False).dtype.kind in "iu"

    read()
