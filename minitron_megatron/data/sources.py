"""Files that the sources of a corpus name, and the other files in their folders."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from glob import has_magic
from pathlib import Path
from typing import Annotated

from ..errors import DataError, MinitronError
from ..files import files_below, read_json
from ..settings import BeforeValidator, check_path
from .globs import glob_paths
from .readers import FORMATS, is_compact, reader_of

__all__ = [
    "HUB",
    "Sources",
    "check_source",
    "input_files",
    "left_out",
    "most_bytes",
    "names",
    "pair_prefix",
    "places",
    "text_files",
]

HUB = "hf://"
"""Beginning of a source that is a data set of the Hugging Face Hub."""

ADVICE = {
    "a tokenized corpus; make it a source of its own, without the suffix": (".bin", ".idx"),
    "write its rows as .jsonl or .parquet": (".feather", ".csv", ".tsv"),
    "rename it to .jsonl": (".ndjson", ".jsonlines", ".jl"),
    "decompress it": (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z"),
}
"""Advice -> the suffixes of data in other formats to which it applies."""
UNKNOWN = "rename it to .txt or .jsonl if it is such"

NO_DATA_SUFFIXES = (
    *(".md", ".rst", ".py", ".ipynb", ".sh", ".yaml", ".yml", ".toml", ".cfg", ".ini"),
    *(".lock", ".metadata", ".md5", ".sha256", ".crc", ".png", ".jpg", ".svg"),
)
NO_DATA_NAMES = ("readme", "license", "licence", "notice", "copying", "authors", "citation", "changelog", "makefile")
"""Prefixes of file names. Files with these names or suffixes accompany corpora and hold no text of them."""
STATE, SPLITS = "state.json", "dataset_dict.json"
METADATA = ("dataset_info.json", "dataset_infos.json")
"""Files that `datasets` writes beside its data."""

MOST_NAMES = 4
"""Maximum number of files that an error lists."""


def check_source(value: object) -> str:
    """Return the path, glob or name of the Hub that a setting gives. Raises ValueError where it can be none."""
    path = str(check_path(value))
    return path if path.startswith(HUB) else str(Path(path))


def _check_sources(value: object) -> object:
    """Check a place of text or a list of places, with one message (pydantic gives one per alternative)."""
    return tuple(map(check_source, value)) if isinstance(value, list | tuple) and value else check_source(value)


Sources = Annotated[str | tuple[str, ...], BeforeValidator(_check_sources)]
"""Setting: a file, a folder, a glob or a data set of the Hub, or a list of them."""

Files = list[Path]
LeftOut = dict[str, list[Path]]
"""Reason -> the files that are not read for it."""


def text_files(sources: Sequence[str | Path]) -> Files:
    """Return the files to read, in the order of `sources`; those of a folder (recursively, through links) by name.

    A source is a file, a folder or a glob. Raises DataError where one holds nothing to read, where a folder holds files
    that may be data in another format, or where a file is named twice, also through links.
    """
    files = [file for source in sources for file in _find(source)[0]]
    real: dict[Path, Path] = {}
    for file in files:
        if (first := real.setdefault(file.resolve(), file)) is not file:
            twice = f"{file} is named twice" if file == first else f"{file} and {first} are the same file, named"
            raise DataError(f"{twice} by {names(map(str, sources))}. Name it once.")
    return files


def left_out(sources: Sequence[str | Path]) -> LeftOut:
    """Return the files in folders and globs of `sources` that are certainly not data, by the reason."""
    found: LeftOut = defaultdict(list)
    for source in sources:
        for reason, files in _find(source)[1].items():
            found[reason] += files
    return found


def pair_prefix(source: str | Path) -> Path | None:
    """Return the prefix of the `.bin/.idx` pair that a source names, with or without a suffix; None for other sources.

    Raises DataError where one file of the pair is missing.
    """
    name = str(source)
    prefix = next((name.removesuffix(suffix) for suffix in (".bin", ".idx") if name.endswith(suffix)), name)
    there = {kind: Path(f"{prefix}.{kind}") for kind in ("bin", "idx")}
    if prefix == name and (Path(name).exists() or not there["idx"].is_file()):
        return None
    for file in there.values():
        if not file.is_file():
            raise DataError(
                f"{name} is not a tokenized corpus: there is no {file}. Name the prefix of a .bin/.idx pair."
            )
    return Path(prefix)


def input_files(sources: Sequence[str | Path]) -> Files:
    """Return the files on this machine that hold the tokens of `sources`, without asking the Hub for others."""
    here = [source for source in sources if not str(source).startswith(HUB)]
    pairs = [Path(f"{prefix}.bin") for prefix in map(pair_prefix, here) if prefix]
    return pairs + text_files([source for source in here if not pair_prefix(source)])


def places(sources: Sequence[str | Path]) -> Files:
    """Return the files and folders of this machine that `sources` name; those that do not exist too."""
    found: Files = []
    for source in sources:
        if prefix := pair_prefix(source):
            found += [Path(f"{prefix}.idx"), Path(f"{prefix}.bin")]
        elif not str(source).startswith(HUB):
            found += _matches(source) or [Path(source)]
    return found


def most_bytes(sources: Sequence[str | Path]) -> float:
    """Return an upper limit of the bytes of text, and thereby of the tokens, of `sources`.

    Infinity where it is unknown: for compressed and columnar files, and for data sets of the Hub.
    """
    if any(str(source).startswith(HUB) for source in sources):
        return math.inf
    files = input_files(sources)
    packed = any(reader_of(file) and is_compact(file) and file.stat().st_size for file in files)
    return math.inf if packed else sum(file.stat().st_size for file in files)


def _find(source: str | Path) -> tuple[Files, LeftOut]:
    path = Path(source)
    try:
        if path.is_dir():
            return _sorted_out(files_below(path), path, f"The folder {path}")
        if path.exists():
            return _file(path), {}
        if found := _matches(source):
            below = [file for each in found for file in (files_below(each) if each.is_dir() else [each])]
            return _sorted_out(list(dict.fromkeys(below)), Path(), f"The pattern {source}")
    except MinitronError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source} cannot be read: {getattr(error, 'strerror', 0) or error}. Correct its path."
        ) from error
    raise DataError(f"There is no file or folder {source}. Correct its path.")


def _matches(source: str | Path) -> Files:
    """Return the paths that match a glob, by name; empty for a path that exists."""
    magic = has_magic(str(source)) and not Path(source).exists()
    return glob_paths(str(source)) if magic else []


def _file(source: Path) -> Files:
    if not source.is_file():
        raise DataError(f"{source} is neither a regular file nor a folder. Write its text to a file.")
    if reader_of(source) is None:
        raise DataError(f"{source} is neither {_formats('nor')}: {_advice(source)}.")
    return [source]


def _sorted_out(files: Files, folder: Path, where: str) -> tuple[Files, LeftOut]:
    """Return the files to read, and those that hold no data.

    where: the source, for messages. Raises DataError where there are other files, or none to read.
    """
    read: Files = []
    unread: Files = []
    left: LeftOut = defaultdict(list)
    saved = _saved_data_sets(files)
    real = {file.resolve() for file in files if file.is_file() and not file.is_symlink()}
    for file in files:
        if reason := _not_data(file, folder, saved) or _other_name(file, real):
            left[reason].append(file)
        else:
            (read if file.is_file() and reader_of(file) else unread).append(file)
    named = names(f"{_below(file, folder)} ({_advice(file)})" for file in unread)
    if not read:
        held = f"; it holds {named}" if unread else ""
        raise DataError(f"{where} holds no {_formats('or')} files{held}. Name one that does.")
    if unread:
        raise DataError(
            f"{where} holds files that would be left out: {named}. Make each of them {_formats('or')}, or move it away."
        )
    return read, left


def _not_data(file: Path, folder: Path, saved: dict[Path, set[str]]) -> str:
    """Return why a file is certainly not part of a corpus; empty where it may be.

    saved: folder of each saved data set -> names of its data files.
    """
    name, listed = file.name.lower(), saved.get(file.parent)
    if ".git" in _below(file, folder).parts[:-1]:
        return "version control"
    if name in METADATA or name == SPLITS or (name == STATE and listed is not None):
        return "metadata of a data set"
    if name.endswith(".arrow") and listed is not None and file.name not in listed:
        return f"not listed in {STATE}"
    if not file.is_file() or reader_of(file) or any(name.endswith(suffixes) for suffixes in ADVICE.values()):
        return ""
    if (name.startswith(".") and not file.suffix) or name.endswith(NO_DATA_SUFFIXES) or name.startswith(NO_DATA_NAMES):
        return "no data by its name"
    return "" if file.stat().st_size else "empty"


def _other_name(file: Path, real: set[Path]) -> str:
    """Return a reason to leave out a link to a file that is read anyway; else add its file to `real`."""
    if not (file.is_symlink() and file.is_file() and reader_of(file)):
        return ""
    if (target := file.resolve()) in real:
        return "a link to another of the files"
    real.add(target)
    return ""


def _saved_data_sets(files: Files) -> dict[Path, set[str]]:
    """Return the folders among `files` that `datasets` saved, each with the names of its data files.

    Raises DataError where one is incomplete, is a selection of rows, or has several splits.
    """
    saved: dict[Path, set[str]] = {}
    there = set(files)
    for file in files:
        if file.name not in (STATE, SPLITS):
            continue
        match read_json(file):
            case {"splits": [str(), str(), *_] as splits} if file.name == SPLITS:
                raise DataError(
                    f"{file.parent} holds the splits {', '.join(map(str, splits))}. "
                    f"Name the folder of one of them, such as {file.parent / str(splits[0])}."
                )
            case {"_indices_data_files": [*_]} if file.name == STATE:
                raise DataError(
                    f"{file.parent} is a selection of rows. Save it again after flatten_indices() of datasets."
                )
            case {"_data_files": [*listed]} if file.name == STATE:
                saved[file.parent] = {str(each.get("filename")) for each in listed if isinstance(each, dict)}
                for name in sorted(saved[file.parent]):
                    if file.parent / name not in there:
                        raise DataError(f"{file} lists {name}, which is not there. Copy the folder again.")
    return saved


def _below(file: Path, folder: Path) -> Path:
    return file.relative_to(folder) if file.is_relative_to(folder) else file


def _advice(file: Path) -> str:
    if not file.is_file():
        return "a broken link" if file.is_symlink() else "not a regular file"
    return next((advice for advice, ends in ADVICE.items() if file.name.lower().endswith(ends)), UNKNOWN)


def names(files: Iterable[str], most: int = MOST_NAMES) -> str:
    """Return the first `most` of `files`, separated by commas, and the number of the others."""
    listed = list(files)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _formats(word: str) -> str:
    return f" {word} ".join(FORMATS)
