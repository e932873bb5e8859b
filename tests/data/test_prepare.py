"""Text becomes the expected tokens, for any number of processes, or gives a clear error."""

from __future__ import annotations

import hashlib
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_megatron.data import prepare
from minitron_megatron.errors import DataError
from minitron_megatron.events import Event

Lines = Callable[..., Path]


def stored(prefix: object) -> list[list[int]]:
    """Return the documents of a pair, read by megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    pair = IndexedDataset(str(prefix))
    return [pair[i].tolist() for i in range(len(pair))]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_end_with_the_end_token_and_get_no_other(tokenizer: Path, lines: Lines, tmp_path: Path) -> None:
    source = lines("a.jsonl", '{"text": "w5 w6 w7"}', "", '{"text": "w8", "more": 1}', '{"text": " "}')
    result = prepare([source], tokenizer, tmp_path / "out" / "a", validation=0)
    assert stored(result.train.prefix) == [[5, 6, 7, 0], [8, 0]]
    assert (result.train.documents, result.train.tokens, result.valid) == (2, 6, None)
    assert (tmp_path / "out" / "a.train.bin").stat().st_size == 6 * 2  # uint16
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.train.bin", "a.train.idx", "a.train.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w1 w2\n<|endoftext|>\nw3<|endoftext|>", [[1, 2, 0], [3, 0]]),
        ("w1 w2\n\nw3", [[1, 2, 3, 0]]),
        ("w4 <|end", [[4, 0, 0]]),  # not a separator, but an unknown word
    ],
)
def test_text_files_are_parted_at_the_separator(
    text: str, expected: list[list[int]], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron_megatron.data.readers.CHUNK_CHARS", 5)  # separators straddle chunk boundaries
    (tmp_path / "a.txt").write_text(text)
    assert stored(prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "a", validation=0).train.prefix) == expected


def test_folders_are_read_at_any_depth_by_name_and_the_key_and_separator_can_be_set(
    tokenizer: Path, lines: Lines, tmp_path: Path
) -> None:
    lines("in/b/two.jsonl", '{"body": "w2"}')
    lines("in/a.txt", "w1 --- w9")
    lines("in/c.jsonl", '{"body": "w3"}')
    lines("in/readme.md", "w4")
    result = prepare([tmp_path / "in"], tokenizer, tmp_path / "a", validation=0, text_key="body", separator="---")
    assert stored(result.train.prefix) == [[1, 0], [9, 0], [2, 0], [3, 0]]


def test_the_result_does_not_depend_on_the_number_of_workers(
    tokenizer: Path, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[prepare.__module__], "BATCH_CHARS", 100)
    source = lines("a.jsonl", *(json.dumps({"text": f"w{1 + i} " * (1 + i % 17)}) for i in range(300)))
    results = [prepare([source], tokenizer, tmp_path / f"{w}" / "a", validation=0.1, workers=w) for w in (1, 2)]
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")
    assert results[0].content == results[1].content


def test_validation_documents_are_drawn_by_index_and_seed(tokenizer: Path, lines: Lines, tmp_path: Path) -> None:
    source = lines("a.jsonl", *(json.dumps({"text": f"w{1 + i}"}) for i in range(1000)))

    def valid(name: str, seed: int, *sources: Path) -> list[int]:
        result = prepare(sources, tokenizer, tmp_path / name, validation=0.1, seed=seed)
        assert result.valid is not None
        held, trained = ([document[0] for document in stored(s.prefix)] for s in (result.valid, result.train))
        assert sorted([*held, *trained]) == sorted(range(1, 1001 + 10 * (len(sources) - 1)))
        return held

    assert 60 < len(valid("a", 0, source)) < 140  # 4 sigma
    assert valid("b", 1, source) != valid("a", 0, source)
    longer = lines("b.jsonl", *(json.dumps({"text": f"w{1001 + i}"}) for i in range(10)))
    assert [i for i in valid("c", 0, source, longer) if i <= 1000] == valid("a", 0, source)


def test_named_validation_sources_override_the_draw(tokenizer: Path, lines: Lines, tmp_path: Path) -> None:
    train, valid = lines("a.jsonl", '{"text": "w1"}', '{"text": "w2"}'), lines("v.jsonl", '{"text": "w3"}')
    result = prepare([train], tokenizer, tmp_path / "a", validation=[valid])
    assert result.valid is not None
    assert (stored(result.train.prefix), stored(result.valid.prefix)) == ([[1, 0], [2, 0]], [[3, 0]])


def test_the_content_hash_tells_tokens_and_boundaries_not_places(tokenizer: Path, lines: Lines, tmp_path: Path) -> None:
    def content(name: str, *texts: str) -> str:
        source = lines(f"{name}.jsonl", *(json.dumps({"text": text}) for text in texts))
        return prepare([source], tokenizer, tmp_path / name, validation=0).content

    assert content("a", "w1 w2", "w3") == content("b", "w1 w2", "w3")
    assert len({content("a", "w1 w2", "w3"), content("c", "w1 w2", "w4"), content("d", "w1 <end> w2", "w3")}) == 3
    assert content("e", "w1 <end> w2") != content("f", "w1", "w2")


def test_progress_reaches_the_bytes_of_the_sources(
    tokenizer: Path, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[prepare.__module__], "BATCH_CHARS", 50)
    source = lines("a.jsonl", *(json.dumps({"text": "w1 w2 w3 w4"}) for _ in range(20)))
    events: list[Event] = []
    prepare([source], tokenizer, tmp_path / "a", validation=0, listener=events.append)
    done = [event.done for event in events]
    assert len(events) == 5 and done == sorted(done) and 0 < done[0] < done[-1]
    assert {event.total for event in events} == {source.stat().st_size} == {done[-1]}
    assert events[-1].values == {"documents": 20, "tokens": 100}
    assert {(event.label, event.unit) for event in events} == {("prepare", "bytes")}


def test_a_failed_run_leaves_what_was_there(tokenizer: Path, lines: Lines, tmp_path: Path) -> None:
    good, bad = lines("g.jsonl", '{"text": "w1"}'), lines("b.jsonl", '{"text": "w2"}', '{"text": "w3"')
    prepare([good], tokenizer, tmp_path / "out" / "a", validation=0)
    before = snapshot(tmp_path / "out")
    with pytest.raises(DataError, match=r"b\.jsonl:2 is not valid JSON: "):
        prepare([bad], tokenizer, tmp_path / "out" / "a", validation=0)
    assert snapshot(tmp_path / "out") == before


def test_a_later_run_leaves_no_split_of_an_earlier_one(tokenizer: Path, lines: Lines, tmp_path: Path) -> None:
    source = lines("a.jsonl", '{"text": "w1"}')
    prepare([source], tokenizer, tmp_path / "out" / "a", validation=[source])
    prepare([source], tokenizer, tmp_path / "out" / "a", validation=0)
    assert set(snapshot(tmp_path / "out")) == {"a.train.bin", "a.train.idx", "a.train.json"}


def test_a_run_killed_while_publishing_leaves_no_pair_of_two_runs(
    tokenizer: Path, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([lines("a.jsonl", '{"text": "w1"}')], tokenizer, tmp_path / "out" / "a", validation=0)
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare([lines("b.jsonl", '{"text": "w2 w3"}')], tokenizer, tmp_path / "out" / "a", validation=0)
    assert not (tmp_path / "out" / "a.train.idx").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "in.jsonl holds no documents. Remove it, or fill it."),
        ('{"text": "  "}\n\n', "in.jsonl holds no documents"),
        ('{"text": "w1"}\n{"text": \n', "in.jsonl:2 is not valid JSON"),
        ('{"body": "w1", "id": 3}\n', "in.jsonl:1 has no text under the key 'text'; it holds the keys 'body', 'id'"),
        ('{"text": null}\n', "in.jsonl:1 has no text under the key 'text': its value is null"),
        ('{"text": "w1"}\n{"text": 3}\n', "in.jsonl:2 has no text under the key 'text': its value is a number"),
        ('{"text": NaN}\n', "in.jsonl:1 has no text under the key 'text': its value is a number"),
        ('{"text": ["w1"]}\n', "in.jsonl:1 has no text under the key 'text': its value is a list"),
        ('{"text": {"text": "w1"}}\n', "in.jsonl:1 has no text under the key 'text': its value is an object"),
        ('{"text": true}\n', "in.jsonl:1 has no text under the key 'text': its value is a boolean"),
        ("[1]\n", "in.jsonl:1 has no text under the key 'text'; it holds a list"),
        ("{}\n", "in.jsonl:1 has no text under the key 'text'; it holds no keys"),
        ('{"text": "w1", "a": 1, "text": "w2"}\n', "in.jsonl:1 has the key 'text' twice"),
        ('{"text": "w1"}\n' + "[" * 100_000 + "\n", "in.jsonl:2 is nested too deeply"),
        ('{"text": "w1", "a": ' + '{"a":' * 100_000 + "\n", "in.jsonl:1 is nested too deeply"),
        ('{"text": "a\0b"}\n', "in.jsonl:1 is not valid JSON"),
    ],
)
def test_bad_lines_are_named(content: str, message: str, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        prepare([tmp_path / "in.jsonl"], tokenizer, tmp_path / "a", validation=0)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"^There is no file or folder .*missing\.txt\. Correct its path\.$"),
        ("table.csv", b"a,b", "neither .jsonl nor "),
        ("latin.txt", b"w1\r\ncaf\xe9", "latin.txt:2 is not UTF-8: .* at byte 3 of the line"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "latin.jsonl:1 is not UTF-8: .* at byte 13 of the line"),
        ("wide.txt", "w1".encode("utf-16"), r"wide.txt:1 is not UTF-8.*iconv -f UTF-16"),
        ("wide.jsonl", '{"text": "w1"}'.encode("utf-16"), r"wide.jsonl:1 is not UTF-8.*iconv -f UTF-16"),
        ("folder/table.csv", b"a,b", "holds no .jsonl or "),
    ],
)
def test_bad_files_are_named(name: str, content: bytes | None, message: str, tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    source = path.parent if path.parent != tmp_path else path
    with pytest.raises(DataError, match=message):
        prepare([source], tokenizer, tmp_path / "a", validation=0)


def test_a_share_that_leaves_a_split_empty_is_refused(tokenizer: Path, lines: Lines, tmp_path: Path) -> None:
    source = lines("a.jsonl", '{"text": "w1"}', '{"text": "w2"}')
    none_left = r"^`validation` 1e-09 leaves no document for the valid split of 2 documents\. Set a larger fraction, or"
    with pytest.raises(DataError, match=none_left):
        prepare([source], tokenizer, tmp_path / "a", validation=1e-9)
    with pytest.raises(
        DataError, match=r"^`validation` 1\.5 is not a fraction of the documents\. Give 0, a number below 1, or"
    ):
        prepare([source], tokenizer, tmp_path / "a", validation=1.5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_sound_text_gives_the_bytes_that_it_always_gave(tokenizer: Path, tmp_path: Path) -> None:
    """All kinds of line ends, blank documents, nested folders, hidden files, NaN values, byte order marks in lines."""
    folder = tmp_path / "in"
    (folder / "b" / "c.jsonl").mkdir(parents=True)
    long = (json.dumps({"text": f"w{i} " * (i % 7), "n": 1.5, "o": {"text": 1}}) + "\r\n" for i in range(1, 200))
    (folder / "z.jsonl").write_bytes("".join(long).encode())
    (folder / "a.txt").write_bytes(
        b"\r\nw1 w2\r\nw3\r<|endoftext|>\n\n<|endoftext|> w4 <|endoftext|>\n" + "é w5\u2028w6 ".encode()
    )
    pairs = '{"a": 1, "text": "w7 \\u00e9 \\ud83d\\ude00 w8\\nw9"}\n\n  \n{"text": ""}\n'
    (folder / "b" / "c.jsonl" / "x.jsonl").write_bytes(pairs.encode())
    (folder / "b" / ".h.jsonl").write_bytes('\ufeff{"text": "w10"}\n\ufeff{"text": "w11", "x": NaN}\n'.encode())
    made = prepare([folder], tokenizer, tmp_path / "out", validation=0.2, seed=3)
    files = (tmp_path / f"out.{split}.{kind}" for split in ("train", "valid") for kind in ("bin", "idx"))
    assert hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest().startswith("ebcd0d034ae19cfa")
    assert made.content.startswith("536478195d92a3e0")


def test_the_token_dtype_follows_the_vocabulary() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    from minitron_megatron.data.token_writer import token_dtype

    sizes = (1536, 65499, 65500, 128256)
    assert [token_dtype(vocab) for vocab in sizes] == [DType.optimal_dtype(vocab) for vocab in sizes]


def test_what_is_written_does_not_stay_in_memory(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[prepare.__module__], "BATCH_CHARS", 1000)
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "w1" + " " * 50_000}) + "\n") * 40)
    tracemalloc.start()
    try:
        prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", validation=0)
        assert tracemalloc.get_traced_memory()[1] < 20 * 50_000
    finally:
        tracemalloc.stop()
