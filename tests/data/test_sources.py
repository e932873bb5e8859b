"""No file of a source is skipped silently, and ambiguous bytes are refused with their file and line."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from glob import glob
from pathlib import Path

import pytest

from minitron_megatron.data import prepare, text_files
from minitron_megatron.data.document import Fields
from minitron_megatron.data.globs import glob_paths
from minitron_megatron.data.readers import documents
from minitron_megatron.data.sources import left_out
from minitron_megatron.errors import DataError, FileError
from minitron_megatron.files import file_marks

SEPARATOR = "<|endoftext|>"


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes files below a folder `in`, with a text each, and returns the folder."""

    def write(*names: str, content: str = '{"text": "w1"}\n') -> Path:
        for name in names:
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path / "in"

    return write


def names(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in text_files([folder])]


def texts(file: Path, text_key: str = "text", separator: str = SEPARATOR) -> list[str]:
    return [document.text for document in documents(file, Fields(text_key, separator))]


def test_links_are_followed_and_no_folder_is_read_twice(tree: Callable[..., Path], tmp_path: Path) -> None:
    folder = tree("a/1.jsonl", "c/deep/2.txt")
    (tmp_path / "store" / "more").mkdir(parents=True)
    (tmp_path / "store" / "more" / "3.jsonl").write_text('{"text": "w3"}')
    (tmp_path / "4.jsonl").write_text('{"text": "w4"}')
    for link, target in {
        "b": "../store",  # a folder outside
        "b2": "../store/more",  # a subfolder of the same
        "a/up": "..",  # a cycle
        "c/itself": ".",
        "0": "c",  # a sibling, listed under its real name
        "d.jsonl": "../4.jsonl",
    }.items():
        (folder / link).symlink_to(target)
    (tmp_path / "store" / "back").symlink_to(folder)
    assert names(folder) == ["a/1.jsonl", "b/more/3.jsonl", "c/deep/2.txt", "d.jsonl"]
    before = file_marks([folder])
    assert [Path(name).name for name, *_ in before] == ["1.jsonl", "3.jsonl", "2.txt", "d.jsonl"]
    (tmp_path / "store" / "more" / "3.jsonl").write_text('{"text": "w5 w6"}')
    assert file_marks([folder]) != before  # so that a run notices changed text


def test_a_file_with_several_names_is_read_once(tree: Callable[..., Path], tmp_path: Path) -> None:
    folder = tree("1.jsonl", "b/2.jsonl")
    (tmp_path / "3.jsonl").write_text('{"text": "w3"}')
    for link, target in {"0.jsonl": "1.jsonl", "a.jsonl": "../3.jsonl", "b/c.jsonl": "../../3.jsonl"}.items():
        (folder / link).symlink_to(target)
    assert names(folder) == ["1.jsonl", "a.jsonl", "b/2.jsonl"]
    assert left_out([folder]) == {"a link to another of the files": [folder / "0.jsonl", folder / "b/c.jsonl"]}
    with pytest.raises(DataError, match=r"3\.jsonl (is named twice|and .* are the same file)"):
        text_files([folder, tmp_path / "3.jsonl"])


@pytest.mark.parametrize(
    "pattern",
    ["*", "a*/*.jsonl", "**/*.jsonl", "*/**/c/?.jsonl", "**/.h/*", "**/b/**/*", "a[b-z]/./1.jsonl", "../in/b*"],
)
def test_a_glob_matches_what_pythons_does(
    pattern: str, tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tree("1.jsonl", "ab/1.jsonl", "ab/b/c/2.jsonl", "b/.h/3.jsonl", ".h/4.jsonl", "b/c/b/[x].txt")
    monkeypatch.chdir(folder)
    for place in (pattern, f"{folder}/{pattern}"):
        found = glob_paths(place)
        assert found == sorted(set(map(Path, glob(place, recursive=True)))) and found
    assert glob_paths(f"{folder}/nothing/*") == glob_paths("1.jsonl/*") == []


def test_a_glob_meets_no_file_twice_and_passes_over_no_folder(
    tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tree("a.jsonl", "b/c.jsonl")
    (folder / "b" / "up").symlink_to("..")
    assert text_files([f"{folder}/**/*.jsonl"]) == [folder / "a.jsonl", folder / "b" / "c.jsonl"]
    assert len(glob(f"{folder}/**/*.jsonl", recursive=True)) > 20  # of Python's
    (folder / "d.jsonl").symlink_to("b/c.jsonl")
    with pytest.raises(DataError, match=r"c\.jsonl and .*d\.jsonl are the same file, named by .*\. Name it once\."):
        text_files([folder / "d.jsonl", folder / "b"])

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)
    monkeypatch.setattr("os.scandir", refuse)
    for pattern in ("*/c.jsonl", "**/c.jsonl", "b/*"):
        with pytest.raises((DataError, FileError), match=r"cannot be read: Permission denied\."):
            text_files([f"{folder}/{pattern}"])


def test_suffixes_are_read_in_any_case_and_folders_may_have_one(tree: Callable[..., Path]) -> None:
    folder = tree("1.jsonl", "2.JSONL", "3.Jsonl", "4.TXT", "x.jsonl/5.jsonl", "y.gz/6.txt", ".hidden/.7.jsonl")
    assert len(names(folder)) == 7
    assert texts(folder / "2.JSONL") == ["w1"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("2.jsonl.bz2", "decompress it"),
        ("2.csv.gz", "decompress it"),
        ("deep/2.txt.XZ", "decompress it"),
        ("2.parquet.zst", "decompress it"),
        ("2.CSV", "write its rows as .jsonl or .parquet"),
        ("readme.tsv", "write its rows as .jsonl or .parquet"),
        ("2.idx", "a tokenized corpus; make it a source of its own, without the suffix"),
        ("2.ndjson", "rename it to .jsonl"),
        ("2.jsonl.bak", "rename it to .txt or .jsonl if it is such"),
        ("part-00002", "rename it to .txt or .jsonl if it is such"),
    ],
)
def test_a_folder_is_never_read_in_part(name: str, advice: str, tree: Callable[..., Path]) -> None:
    folder = tree("1.jsonl", name)
    with pytest.raises(
        DataError, match=rf"holds files that would be left out: {name} \({advice}\)\. Make each of them"
    ):
        text_files([folder])
    with pytest.raises(DataError, match=rf"neither \.jsonl nor .* nor \.arrow: {advice}|no tokenized corpus"):
        text_files([folder / name])
    (folder / "1.jsonl").unlink()
    with pytest.raises(DataError, match=rf"holds no \.jsonl or .* files; it holds {name}.*\. Name one that does\."):
        text_files([folder])


def test_anything_but_a_regular_file_is_refused(tree: Callable[..., Path]) -> None:
    folder = tree("1.jsonl")
    (folder / "2.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(DataError, match=r"left out: 2\.jsonl \(a broken link\)"):
        text_files([folder])
    (folder / "2.jsonl").unlink()
    os.mkfifo(folder / "3.jsonl")
    with pytest.raises(DataError, match=r"left out: 3\.jsonl \(not a regular file\)"):
        text_files([folder])
    with pytest.raises(DataError, match=r"is neither a regular file nor a folder\. Write its text to a file\."):
        text_files([folder / "3.jsonl"])
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    for path in ("nowhere", "loop.jsonl", "x" * 300, "a\0b", "1.jsonl/2.jsonl"):
        with pytest.raises(DataError, match="Correct its path"):
            text_files([folder / path])


def test_many_files_left_out_are_not_all_named(tree: Callable[..., Path]) -> None:
    folder = tree("1.jsonl", *(f"{i:03}.xz" for i in range(300)))
    with pytest.raises(DataError, match=r"003.xz \(decompress it\) and 296 more") as caught:
        text_files([folder])
    assert len(str(caught.value)) < 500


def test_files_that_hold_no_data_are_named_in_one_line(
    tree: Callable[..., Path], tokenizer: Path, tmp_path: Path
) -> None:
    folder = tree("1.jsonl", "README.md", "LICENSE", "make.py", ".gitattributes")
    tree("_SUCCESS", content="")
    with pytest.warns(
        UserWarning, match=r"\.gitattributes, .*LICENSE, .*README.md, .*\(no data by its name\); .*_SUCCESS \(empty\)\."
    ):
        prepare([folder], tokenizer, tmp_path / "a", validation=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare([folder / "1.jsonl"], tokenizer, tmp_path / "a", validation=0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\xef\xbb\xbf{"text": "a"}\n', ["a"]),
        (b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n\xef\xbb\xbf', ["a", "b"]),  # concatenated files
        (b'{"text": "a\\ufeff"}\r\n\r\n{"text": "b\\r\\n"}\r\n', ["a\ufeff", "b\r\n"]),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b', "x": [NaN, -Infinity, 1e999]}', ["a"]),
        (b'{"text": "a\\u0000b", "meta": {"text": null}}', ["a\0b"]),
        (b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"]),
        (b'{"text": "\\ud83d"}\n{"text": "b\\ude00\\ud83d"}', ["\ufffd", "b\ufffd\ufffd"]),
        (b'{"text": ""}\n{"text": " "}\n  \n{"text": "a"}', ["a"]),
    ],
)
def test_a_json_line_means_one_thing(content: bytes, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert texts(tmp_path / "a.jsonl") == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfa\n<|endoftext|>\nb", [("a", 1), ("b", 3)]),
        (b"\xef\xbb\xbf\n\na", [("a", 3)]),
        ("a\ufeff<|endoftext|>\n\ufeffb".encode(), [("a\ufeff", 1), ("\ufeffb", 2)]),
        (b"a\r\n<|endoftext|>\r\nb\r\nc", [("a", 1), ("b\nc", 3)]),
        (b"a\0b", [("a\0b", 1)]),
    ],
)
def test_a_text_file_means_one_thing(
    content: bytes, expected: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    for chunk in (1 << 20, 5):
        monkeypatch.setattr("minitron_megatron.data.readers.CHUNK_CHARS", chunk)
        found = list(documents(tmp_path / "a.txt", Fields("text", SEPARATOR)))
        assert [(each.text, each.place) for each in found] == [(t, f"{tmp_path}/a.txt:{n}") for t, n in expected]


def test_half_surrogates_are_counted_at_any_number_of_workers(tokenizer: Path, tmp_path: Path) -> None:
    lines = [f'{{"text": "w{i}"}}' for i in range(1, 60)] + [r'{"text": "w1 \ud83d \ude00"}', r'{"text": "\udfff"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for workers in (1, 2):
        with pytest.warns(UserWarning, match=r"3 unpaired surrogates became U\+FFFD, the first in .*a\.jsonl:60"):
            prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / f"{workers}", validation=0, workers=workers)
    assert (tmp_path / "1.train.bin").read_bytes() == (tmp_path / "2.train.bin").read_bytes()


def test_keys_are_of_the_outermost_object(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"meta": {"text": "a"}, "meta.text": "b", "": "c"}')
    assert [texts(tmp_path / "a.jsonl", key) for key in ("meta.text", "")] == [["b"], ["c"]]
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"meta": {"text": "a"}, "x" * 10_000: 1, **{f"k{i}": 1 for i in range(99)}})
    )
    with pytest.raises(
        DataError, match=r"b.jsonl:1 has no text under the key 'meta.text'; .*'meta', .*of the outermost"
    ):
        texts(tmp_path / "b.jsonl", "meta.text")
    with pytest.raises(DataError, match="and 93 more") as caught:
        texts(tmp_path / "b.jsonl", "")
    assert len(str(caught.value)) < 500


def test_enormous_lines_and_documents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("document", "json_text", "readers"):
        monkeypatch.setattr(f"minitron_megatron.data.{module}.MOST_CHARS", 50)
    monkeypatch.setattr("minitron_megatron.data.readers.CHUNK_CHARS", 20)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 60}))
    (tmp_path / "a.txt").write_text(f"a\n{SEPARATOR}\n" + "b" * 100)
    for name, line in (("a.jsonl", 2), ("a.txt", 2)):
        with pytest.raises(DataError, match=f"{name}:{line} begins a document of more than 50 characters"):
            texts(tmp_path / name)


NO_SEPARATOR = r"^An empty separator cannot separate documents\. Set `separator` to the text between them\.$"


def test_empty_sources_separators_and_places_are_refused_before_work(
    tree: Callable[..., Path], tokenizer: Path, tmp_path: Path
) -> None:
    folder = tree("a.jsonl", "b.txt", content=" \n\n")
    with pytest.raises(DataError, match=r"a\.jsonl holds no documents\. Remove it, or fill it\."):
        prepare([folder], tokenizer, tmp_path / "x", validation=0)
    tree("a.jsonl")
    with pytest.raises(DataError, match=NO_SEPARATOR):
        prepare([folder], tokenizer, tmp_path / "x", validation=0, separator="")
    for place in ("x" * 300, "in/a.jsonl/x"):
        with pytest.raises(FileError, match="cannot be written"):
            prepare([folder / "a.jsonl"], tokenizer, tmp_path / place, validation=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.txt cannot be read: No such file"):
        texts(tmp_path / "gone.txt")
