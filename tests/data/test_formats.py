"""Every format gives the tokens of the same text in .jsonl, and damage to any of them is one error that says where."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from minitron_megatron.data import most_bytes, places, prepare, text_files
from minitron_megatron.data.document import Fields
from minitron_megatron.data.hub import hub_files
from minitron_megatron.data.readers import documents
from minitron_megatron.errors import DataError, FileError
from tests.formats import cache_of_the_hub, zst

TEXTS = [f"w{1 + i} " * (1 + i % 7) + ("\n\u00e9 \U0001f600 w2\u2028w3" if i % 3 else "") for i in range(300)]
TEXTS[17], TEXTS[40] = "", " \n"  # blank: left out in every format


def records(texts: list[str]) -> list[dict[str, Any]]:
    return [{"id": i, "text": text, "meta": {"text": "no"}} for i, text in enumerate(texts)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records(texts)).encode()


def table(texts: list[str], kind: Any = None) -> pa.Table:
    column = pa.array(texts, kind or pa.string())
    return pa.table({"id": pa.array(range(len(texts)), pa.int64()), "text": column})


def arrow(made: pa.Table, new: Callable[..., Any]) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=37)
    return sink.getvalue().to_pybytes()


def parquet(made: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(made, sink, **options)
    return sink.getvalue().to_pybytes()


def saved(path: Path, texts: list[str]) -> None:
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(path), num_shards=3)


WAYS: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "jsonl": ("a.jsonl", lines),
    "jsonl.gz": ("a.jsonl.gz", lambda texts: gzip.compress(lines(texts[:9])) + gzip.compress(lines(texts[9:]))),
    "jsonl.zst": ("a.JSONL.ZST", lambda texts: zst(lines(texts[:9])) + zst(lines(texts[9:]))),
    "json list": ("a.json", lambda texts: json.dumps(records(texts)).encode()),
    "json indented": ("a.json", lambda texts: b"\xef\xbb\xbf" + json.dumps(records(texts), indent=1).encode()),
    "json lines": ("a.json", lines),
    "json after json": ("a.json", lambda texts: b" ".join(json.dumps(r, indent=2).encode() for r in records(texts))),
    "json.gz": ("a.json.gz", lambda texts: gzip.compress(lines(texts))),
    "json.zst": ("a.json.zst", lambda texts: zst(json.dumps(records(texts), ensure_ascii=False).encode())),
    "parquet": ("a.parquet", lambda texts: parquet(table(texts), row_group_size=70)),
    "parquet large": ("a.parquet", lambda texts: parquet(table(texts, pa.large_string()), compression="zstd")),
    "parquet dictionary": (
        "a.parquet",
        lambda texts: parquet(table(texts).set_column(1, "text", table(texts)["text"].dictionary_encode())),
    ),
    "arrow stream": ("a.arrow", lambda texts: arrow(table(texts), pa.ipc.new_stream)),
    "arrow view": ("a.arrow", lambda texts: arrow(table(texts, pa.string_view()), pa.ipc.new_file)),  # polars writes it
    "arrow file": ("a.ARROW", lambda texts: arrow(table(texts), pa.ipc.new_file)),
}


def written(folder: Path, way: str, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WAYS[way][0]
    path.write_bytes(WAYS[way][1](texts))
    return path


def tokens(tokenizer: Path, out: Path, *sources: Path | str) -> bytes:
    prepare(sources, tokenizer, out, validation=0.1)
    return b"".join(
        Path(f"{out}.{split}.{kind}").read_bytes() for split in ("train", "valid") for kind in ("bin", "idx")
    )


@pytest.fixture(scope="module")
def plain(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("plain")
    return tokens(tokenizer, folder / "out", written(folder, "jsonl", TEXTS))


@pytest.mark.parametrize("way", WAYS)
def test_each_gives_the_tokens_of_the_same_text(
    way: str, tokenizer: Path, plain: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron_megatron.data.json_text.CHUNK_CHARS", 50)  # records straddle chunks
    assert tokens(tokenizer, tmp_path / "out", written(tmp_path, way, TEXTS)) == plain


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_separated_text_gives_the_tokens_too(packed: str, tokenizer: Path, plain: bytes, tmp_path: Path) -> None:
    content = "<|endoftext|>".join(TEXTS).encode()
    (tmp_path / f"a.txt{packed}").write_bytes(
        {"": content, ".gz": gzip.compress(content), ".zst": zst(content)}[packed]
    )
    assert tokens(tokenizer, tmp_path / "out", tmp_path / f"a.txt{packed}") == plain


def test_a_corpus_over_five_formats_equals_the_plain_one(tokenizer: Path, plain: bytes, tmp_path: Path) -> None:
    ways = ["jsonl", "parquet", "json list", "jsonl.zst", "arrow stream", "jsonl.gz"]
    parts = [TEXTS[i * 50 : (i + 1) * 50] for i in range(6)]
    for number, (way, texts) in enumerate(zip(ways, parts, strict=True)):
        written(tmp_path / "in" / str(number), way, texts)
    files = sorted((tmp_path / "in").glob("*/*"))
    assert len({file.suffix.lower() for file in files}) == 6
    assert tokens(tokenizer, tmp_path / "folder", tmp_path / "in") == plain
    assert tokens(tokenizer, tmp_path / "list", *files) == plain
    assert tokens(tokenizer, tmp_path / "glob", f"{tmp_path}/in/**/a.*") == plain
    assert places([f"{tmp_path}/in/*/a.*"]) == files


def test_folders_that_datasets_saved_are_read_whole_and_nothing_else(
    tokenizer: Path, plain: bytes, tmp_path: Path
) -> None:
    saved(tmp_path / "in", TEXTS)
    shutil.copy(tmp_path / "in" / "data-00000-of-00003.arrow", tmp_path / "in" / "cache-12ab.arrow")
    with pytest.warns(UserWarning, match=r"cache-12ab.arrow \(not listed in state.json\).*\(metadata of a data set\)"):
        assert tokens(tokenizer, tmp_path / "out", tmp_path / "in") == plain
    (tmp_path / "in" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(
        DataError, match=r"state.json lists data-00001-of-00003.arrow, which is not there\. Copy the folder again"
    ):
        text_files([tmp_path / "in"])
    halves = {name: datasets.Dataset.from_dict({"text": TEXTS}) for name in ("train", "test")}
    datasets.DatasetDict(halves).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(
        DataError, match=r"holds the splits train, test. Name the folder of one of them, such as .*train"
    ):
        text_files([tmp_path / "both"])
    assert len(text_files([tmp_path / "both" / "train"])) == 1
    state = json.loads((tmp_path / "both" / "train" / "state.json").read_text())
    (tmp_path / "both" / "train" / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{}]}))
    with pytest.raises(DataError, match=r"is a selection of rows\. Save it again after flatten_indices\(\)"):
        text_files([tmp_path / "both" / "train"])
    (tmp_path / "both" / "train" / "state.json").write_text("{")
    with pytest.raises(FileError, match=r"^\S*state.json is not JSON"):
        text_files([tmp_path / "both" / "train"])


def test_data_sets_of_the_hub_come_from_its_cache(
    tokenizer: Path, plain: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "cached", TEXTS)
    asked = []

    def load(name: str, configuration: str | None, split: str) -> Any:
        asked.append((name, configuration, split))
        return datasets.load_from_disk(str(tmp_path / "cached"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub_files.cache_clear()
    assert tokens(tokenizer, tmp_path / "out", "hf://owner/some.name:validation") == plain
    hub_files("hf://owner/name/main")
    assert asked == [("owner/some.name", None, "validation"), ("owner/name", "main", "train")]
    assert places(["hf://owner/name"]) == [] and most_bytes(["hf://owner/name"]) == float("inf")  # asks nobody
    for wrong in ("hf://name", "hf://a/b/c/d", "hf://a/b:", "hf://../b:x y"):
        with pytest.raises(DataError, match="does not name a data set of the Hub"):
            hub_files(wrong)


def test_a_data_set_that_cannot_be_had_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (offline).\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    hub_files.cache_clear()
    with pytest.raises(DataError, match=r"hf://owner/name cannot be downloaded: Couldn't reach .*offline\)\. Correct"):
        hub_files("hf://owner/name")


def test_without_a_network_the_cache_serves(tmp_path: Path) -> None:
    """In another process, since `datasets` reads its environment at import."""
    environment = os.environ | cache_of_the_hub(tmp_path / "cache", ["w1", "w2"])
    script = (
        "from minitron_megatron.data.hub import hub_files\n"
        "from minitron_megatron.data.readers import documents, Fields\n"
        "print([each.text for file in hub_files('hf://owner/name:train') for each in documents(file, Fields())])\n"
        "try: hub_files('hf://owner/other')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "['w1', 'w2']" and second.startswith("DataError hf://owner/other cannot be downloaded: ")


WHOLE = [f"w{1 + i} w2 w{i * i * 7919 % 3000}" for i in range(2999)]
TORN: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "gz cut off": (
        "a.jsonl.gz",
        lambda: gzip.compress(lines(WHOLE))[:-900],
        r"cut off or damaged after .*a.jsonl.gz:2\d+",
    ),
    "gz without text": ("a.txt.gz", lambda: gzip.compress(b"w1")[:9], "cut off or damaged near its beginning"),
    "no gz": ("a.jsonl.gz", lambda: lines(WHOLE), "cut off or damaged near .*: Not a gzipped file"),
    "gz with a changed byte": (
        "a.jsonl.gz",
        lambda: (lambda c: c[:3000] + bytes(9) + c[3009:])(gzip.compress(lines(WHOLE))),
        r"a.jsonl.gz",
    ),
    "zst cut off": ("a.json.zst", lambda: zst(lines(WHOLE))[:-9], "cut off or damaged after .*: Truncated"),
    "no zst": ("a.jsonl.zst", lambda: lines(WHOLE), "cut off or damaged near its beginning"),
    "zst and more": ("a.txt.zst", lambda: zst(b"w1") + b"more", "cut off or damaged"),
    "parquet without footer": ("a.parquet", lambda: parquet(table(WHOLE))[:-8], "damaged or no Parquet file: .*magic"),
    "parquet with a bad footer": (
        "a.parquet",
        lambda: parquet(table(WHOLE))[:-400] + bytes(392) + parquet(table(WHOLE))[-8:],
        "a.parquet is damaged or no Parquet file",
    ),
    "an empty parquet": (
        "a.parquet",
        lambda: b"",
        r"a\.parquet is damaged or no Parquet file: .*\. Copy or write it again\.$",
    ),
    "arrow cut off": ("a.arrow", lambda: arrow(table(WHOLE), pa.ipc.new_stream)[:-5000], "damaged or no Arrow file"),
    "arrow file cut off": ("a.arrow", lambda: arrow(table(WHOLE), pa.ipc.new_file)[:-99], "damaged or no Arrow file"),
    "an empty arrow": ("a.arrow", lambda: b"", "a.arrow holds no documents"),
    "no column": (
        "a.parquet",
        lambda: parquet(table(WHOLE).rename_columns(["id", "body"])),
        "a.parquet has no text under the column 'text'; it holds the columns 'id', 'body'. Set `text_key`",
    ),
    "a column twice": (
        "a.arrow",
        lambda: arrow(table(WHOLE).rename_columns(["text"] * 2), pa.ipc.new_stream),
        r"a.arrow has the column 'text' twice\. Keep one of them\.",
    ),
    "a column of numbers": ("a.parquet", lambda: parquet(table(WHOLE).rename_columns(["text", "x"])), "holds int64"),
    "a null": ("a.parquet", lambda: parquet(table([*WHOLE[:700], None, "w1"])), "a.parquet, row 700 has .*is null"),
    "no UTF-8 in a column": (
        "a.arrow",
        lambda: arrow(table(WHOLE), pa.ipc.new_stream).replace(b"w1501 w", b"w15\xff1 w"),
        "a.arrow, row 1500 is not UTF-8: invalid start byte at byte 3 of the text",
    ),
    "no UTF-8 in lines": (
        "a.jsonl.gz",
        lambda: gzip.compress(lines(WHOLE).replace(b"w1501 ", b"w15\xff1 ")),
        r"a.jsonl.gz:1501 is not UTF-8: invalid start byte at byte 25 of the line",
    ),
    "no UTF-8 in a list": (
        "a.json",
        lambda: json.dumps(records(WHOLE), indent=1).encode().replace(b"w1501 ", b"w15\xff1 "),
        r"a.json:10504 is not UTF-8",
    ),
    "no UTF-8 in text": (
        "a.txt.zst",
        lambda: zst("\n".join(WHOLE).encode().replace(b"w1501 ", b"w15\xff1 ")),
        r"a.txt.zst:1501 is not UTF-8",
    ),
    "a list cut off": ("a.json", lambda: json.dumps(records(WHOLE)).encode()[:-9], r"a.json:1 \(record 2999\) is not"),
    "a list without an end": (
        "a.json",
        lambda: json.dumps(records(WHOLE)).encode()[:-1],
        r"a.json:1 ends within a list\. Copy the file again\.",
    ),
    "a list without a comma": (
        "a.json",
        lambda: b'[{"text": "w1"}\n{"text": "w2"}]',
        r"a.json:2 has neither a comma nor the end of the list\. Correct the file\.",
    ),
    "more than a list": (
        "a.json",
        lambda: b'[{"text": "w1"}]\n[]',
        r"a.json:2 goes on after the end of the list\. Correct",
    ),
    "a list of text": ("a.json", lambda: b'["w1"]', r"a.json:1 \(record 1\) has no text under .*it holds text"),
    "a list of lists": ("a.json", lambda: b'[{"text": "w1"}, ' + b"[" * 9**5, r"\(record 2\) is nested too deeply"),
    "no JSON": (
        "a.json",
        lambda: b'{"text": "w1"}\n{"text": w2}' + b" " * 99,
        r"a.json:2 \(record 2\) is not valid JSON",
    ),
    "an open text": (
        "a.json",
        lambda: b'{"text": "w1"}\n{"text": "w2',
        r"a.json:2 \(record 2\) is not valid JSON: Unter",
    ),
    "a key twice": ("a.json", lambda: b'[{"text": "w1", "text": "w2"}]', "has the key 'text' twice"),
    "an empty list": ("a.json", lambda: b" []\n", r"a.json holds no documents\. Remove it, or fill it\."),
}


@pytest.mark.parametrize("case", TORN)
def test_damage_is_one_error_that_says_where_and_leaves_nothing(case: str, tokenizer: Path, tmp_path: Path) -> None:
    name, content, message = TORN[case]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(DataError, match=message) as caught:
        prepare([tmp_path / name], tokenizer, tmp_path / "out", validation=0)
    assert len(str(caught.value)) < 500 and name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_surrogates_line_ends_and_marks_mean_one_thing_in_json(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbf[\r\n{"text": "a\\ud83d"}\r\n,\r\n\r\n{"text": "\\ud83d\\ude00\\r\\n", "n": '
        + b"9" * 5000
        + b"}]\r\n"
    )
    (tmp_path / "a.json").write_bytes(content)
    found = list(documents(tmp_path / "a.json", Fields()))
    assert [(each.text, each.replaced) for each in found] == [("a\ufffd", 1), ("\U0001f600\r\n", 0)]
    assert [each.place for each in found] == [f"{tmp_path}/a.json:{n}" for n in ("2 (record 1)", "5 (record 2)")]


def test_progress_of_compressed_files_is_that_of_their_bytes(tmp_path: Path) -> None:
    for way in ("jsonl.gz", "jsonl.zst", "json.zst", "parquet", "json list"):
        file = written(tmp_path, way, TEXTS)
        assert sum(each.source_bytes for each in documents(file, Fields())) <= file.stat().st_size


def test_records_larger_than_any_chunk_are_read_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron_megatron.data.json_text.CHUNK_CHARS", 100)
    text = '"quoted" [{ \\ ' * 100_000
    (tmp_path / "a.json").write_text(json.dumps([{"text": text}, {"text": "b"}]))
    assert [each.text for each in documents(tmp_path / "a.json", Fields())] == [text, "b"]


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "in", "jsonl", TEXTS)
    with pytest.raises(DataError, match=r"in/a\.jsonl is named twice by .*in, .*a\.jsonl\. Name it once\."):
        text_files([tmp_path / "in", file])
    with pytest.raises(DataError, match=r"^There is no file or folder .*\*\.parquet\. Correct its path\."):
        text_files([f"{tmp_path}/in/*.parquet"])
    with pytest.raises(DataError, match=r"The pattern .* holds no .jsonl or .*it holds .*a.csv \(write its rows"):
        (tmp_path / "a.csv").touch()
        text_files([f"{tmp_path}/*.csv"])


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [written(tmp_path / way, way, TEXTS) for way in ("parquet", "arrow stream", "jsonl.zst")]
    for name in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    hub_files.cache_clear()
    for file in files:
        with pytest.raises(
            DataError, match=r"only be read with the package pyarrow: .*\. Install it \(pip install 'minitron-meg"
        ):
            list(documents(file, Fields()))
    with pytest.raises(
        DataError, match=r"be read with the package datasets: .*\. Install it \(pip install 'minitron-megatron\[data\]'"
    ):
        hub_files("hf://owner/name")
