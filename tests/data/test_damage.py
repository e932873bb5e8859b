"""A `.bin/.idx` pair or sample index that is damaged, foreign or malicious is refused before megatron-core reads it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minitron_megatron.data import Corpus, check_content, prepare
from minitron_megatron.data.token_files import find_token_files
from minitron_megatron.errors import DataError, FileError, MinitronError
from minitron_megatron.files import write_checksums
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

HEADER = struct.Struct("<9sQBQQ")


@pytest.fixture
def pair(corpora: tuple[str, str], tmp_path: Path) -> Path:
    """Prefix of a copy of a prepared pair."""
    for file in Path(corpora[0]).parent.glob("low.train.*"):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / "low"


def opened(pair: Path, cache: str = "cache") -> Corpus:
    return Corpus([(pair, 1.0)], sequence=8, samples=20, seed=1, cache=pair.parent / cache)


def written(
    pair: Path, lengths: list[int], *, code: int = 8, counts: tuple[int, int] | None = None, **parts: list
) -> None:
    """Write an .idx for the pair's .bin, with documents of these lengths, and with the given fields overridden."""
    sizes = np.array(lengths, np.int64)
    pointers = np.array(parts.get("pointers", (np.cumsum(sizes) - sizes) * 2), np.int64)
    ends = np.array(parts.get("ends", range(len(lengths) + 1)), np.int64)
    head = HEADER.pack(b"MMIDIDX\0\0", 1, code, *(counts or (len(lengths), len(ends))))
    content = head + sizes.astype(np.int32).tobytes() + pointers.tobytes() + ends.tobytes()
    Path(f"{pair}.train.idx").write_bytes(content)


def test_an_index_of_megatrons_own_and_of_others_is_read(pair: Path) -> None:
    tokens = Path(f"{pair}.train.bin").stat().st_size // 2
    assert find_token_files(pair, "train").tokens == tokens
    Path(f"{pair}.train.json").unlink()  # a pair written by another program has none
    written(pair, [tokens - 5, 0, 5], ends=[0, 2, 3])
    assert find_token_files(pair, "train").tokens == tokens
    assert len(opened(pair)) == 20


UNORDERED = "its document boundaries do not rise from 0 to the number of sequences"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"MMIDIDX", "it is shorter than its header"), (bytes(100), "it does not begin with an index header")],
)
def test_what_is_no_index_is_refused(content: bytes, said: str, pair: Path) -> None:
    Path(f"{pair}.train.json").unlink()
    Path(f"{pair}.train.idx").write_bytes(content)
    with pytest.raises(DataError, match=rf"low\.train\.idx is not an index of .*low\.train\.bin: {said}\. "):
        opened(pair)


@pytest.mark.parametrize(
    ("lengths", "changes", "message"),
    [
        ([100, -10], {}, "do not fit each other"),
        ([2**31 - 1, 10], {}, "counts"),
        ([90], {"counts": (2**63, 2)}, "its size does not fit"),
        ([90], {"counts": (0, 0)}, "its size does not fit"),
        ([90], {"counts": (2**64 - 1, 2**64 - 1)}, "its size does not fit"),
        ([], {"ends": []}, "its size does not fit"),
        ([45, 45], {"pointers": [0, 10**12]}, "do not fit each other"),
        ([45, 45], {"pointers": [0, -90]}, "do not fit each other"),
        ([45, 45], {"pointers": [0, 0]}, "do not fit each other"),
        ([45, 45], {"ends": [0, 2, 1]}, UNORDERED),
        ([45, 45], {"ends": [0, 1, 3]}, UNORDERED),
        ([45, 45], {"ends": [-5, 1, 2]}, UNORDERED),
        ([90], {"code": 7}, "not of an integer type"),
        ([90], {"code": 0}, "not of an integer type"),
        ([90], {"code": 5}, "do not fit each other|counts"),
    ],
)
def test_a_hostile_index_is_refused(lengths: list[int], changes: dict, message: str, pair: Path) -> None:
    Path(f"{pair}.train.json").unlink()
    Path(f"{pair}.train.bin").write_bytes(bytes(180))
    written(pair, [90])
    assert find_token_files(pair, "train").tokens == 90
    written(pair, lengths, **changes)
    with pytest.raises(DataError, match=rf"low\.train\.idx is not an index of .*bin: .*({message})"):
        opened(pair)
    assert not (pair.parent / "cache").exists()


def test_a_flipped_byte_is_found_and_one_file_of_checksums_is_no_other(pair: Path) -> None:
    opened(pair)
    sums = Path(f"{pair}.train.json").read_bytes()
    for kind, at in (("bin", 0), ("bin", 501), ("bin", -1), ("json", sums.index(b"idx") + 9), ("json", len(sums) - 9)):
        file = Path(f"{pair}.train.{kind}")
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[at] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(MinitronError, match=r"low\.train\.\w+ (has changed|holds no checksums|is damaged)"):
            opened(pair)
        file.write_bytes(whole)
    tokens = Path(f"{pair}.train.bin").stat().st_size // 2
    written(pair, [tokens])  # valid in itself
    with pytest.raises(DataError, match=r"low\.train\.idx has changed since it was written"):
        opened(pair)
    for other in (
        "[]",
        "{}",
        '{"idx": 1, "block": 0, "bin": []}',
        '{"content": "", "idx": "", "block": 9, "bin": ["x"]}',
        "torn",
    ):
        Path(f"{pair}.train.json").write_text(other)
        with pytest.raises(MinitronError, match=r"low\.train\.json"):
            opened(pair)


def test_a_corpus_in_the_place_of_another_is_found(tokenizer: Path, lines: Callable[..., Path], tmp_path: Path) -> None:
    source, other = lines("a.jsonl", '{"text": "w1 w2"}', '{"text": "w3"}'), lines("b.jsonl", '{"text": "w4 w5"}')
    for held_out in (0, [source]):
        made = prepare([source], tokenizer, tmp_path / "a", validation=held_out)
        check_content(tmp_path / "a", made.content)
        for sources, valid in (([other], held_out), ([source], [other])):  # valid in itself, at the same path
            prepare(sources, tokenizer, tmp_path / "a", validation=valid)
            with pytest.raises(DataError, match=r"a is not the corpus that this run prepared\. Prepare it again\."):
                check_content(tmp_path / "a", made.content)


def test_a_large_corpus_is_read_in_part(
    tokenizer: Path, lines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, the last and random other blocks are checked: damage anywhere is found eventually."""
    monkeypatch.setattr("minitron_megatron.data.token_writer.BLOCK", 100)
    monkeypatch.setattr("minitron_megatron.data.token_files.BLOCKS_CHECKED", 8)
    source = lines("a.jsonl", *(json.dumps({"text": f"w{1 + i} " * 50}) for i in range(20)))
    prepare([source], tokenizer, tmp_path / "low", validation=0)
    data = tmp_path / "low.train.bin"
    whole = data.read_bytes()
    assert len(json.loads((tmp_path / "low.train.json").read_text())["bin"]) == -(-len(whole) // 100) == 21
    opened(tmp_path / "low")

    def finds(at: int) -> bool:
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            opened(tmp_path / "low")
        except DataError as error:
            assert f"between the bytes {at // 100 * 100:,} and" in str(error)
            return True
        return False

    assert finds(0) and finds(len(whole) - 1)
    assert any(finds(1050) for _ in range(60))  # 6 of 19 blocks a time: all 60 miss with a chance below 1e-9
    assert not all(finds(1050) for _ in range(60))


class Bomb:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.ran),)


def arrays(ran: Path) -> dict[str, bytes]:
    """Return contents for an index file, none of which is a plain, complete array of integers."""

    def saved(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=True)
        return stream.getvalue()

    def headed(header: bytes, version: bytes = b"\x01\x00") -> bytes:
        size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
        return b"\x93NUMPY" + version + size + header + bytes(80)

    stream = io.BytesIO()
    np.savez(stream, a=np.arange(3))
    objects = np.empty(1, object)
    objects[0] = Bomb(ran)
    whole = saved(np.arange(100))
    plain = b"{'descr': '<i8', 'fortran_order': False, 'shape': (10,), }"
    return {
        "a pickle": pickle.dumps(Bomb(ran)),
        "objects": saved(objects),
        "an archive": stream.getvalue(),
        "empty": b"",
        "torn": whole[:-8],
        "longer": whole + b"x",
        "floats": saved(np.ones(3)),
        "records": saved(np.zeros(3, "i4,i8")),
        "fortran": saved(np.asfortranarray(np.ones((3, 2), np.int64))),
        "negative": headed(plain.replace(b"(10,)", b"(-2, -5)")),
        "huge": headed(plain.replace(b"(10,)", b"(10**400,)")),
        "deep": headed(b"(" * 20_000),
        "long": headed(plain + b" " * 60_000),
        "unknown type": headed(plain.replace(b"<i8", b"<x9")),
        "a later version": headed(plain, b"\x02\x00"),
        "code": headed(b"__import__('os').mkdir('x')"),
    }


REASONS = {
    "a later version": r"is not an array: its format version is \(2, 0\)",
    "floats": r"is not a whole array of integers: \(3,\) of float64 in 24 bytes",
}


@pytest.mark.parametrize("kind", arrays(Path()))
@pytest.mark.parametrize("which", ["document", "shuffle"])
def test_no_foreign_array_reaches_megatron(kind: str, which: str, pair: Path, tmp_path: Path) -> None:
    """Refused even if the checksums are adapted."""
    opened(pair)
    (file,) = (tmp_path / "cache").glob(f"*/*{which}_index.npy")
    before, content = file.read_bytes(), arrays(tmp_path / "ran")[kind]
    file.write_bytes(content)
    sums = file.parent / "checksums.json"
    write_checksums(sums, [each for each in file.parent.iterdir() if each != sums])
    reason = REASONS.get(kind, "is not (a whole array of integers|an array): .*")
    with pytest.raises(DataError, match=rf"{file.name} {reason}\. Remove the folder .*cache.*the next run") as caught:
        opened(pair)
    assert "pickle" not in str(caught.value)  # numpy advises to allow pickles
    assert not (tmp_path / "ran").exists() and before != content


def test_a_changed_or_missing_index_is_found(pair: Path, tmp_path: Path) -> None:
    opened(pair)
    (folder,) = (tmp_path / "cache").iterdir()
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        if file.suffix == ".npy":
            changed = np.load(file)
            np.save(file, changed[::-1].copy())
        else:
            file.write_bytes(whole[:-3])
        with pytest.raises(DataError, match=rf"{file.name} .*Remove the folder .*{folder.name}"):
            opened(pair)
        file.unlink()
        with pytest.raises(DataError, match=rf"{file.name} (is missing|cannot be read).*Remove the folder"):
            opened(pair)
        file.write_bytes(whole)
    opened(pair)


def refused(topology: Topology, pair: str) -> str:
    try:
        opened(Path(pair))
    except MinitronError as error:
        return str(error)
    return ""


def test_every_rank_reports_damage(pair: Path, pool: Pool) -> None:
    opened(pair)
    data = Path(f"{pair}.train.bin")
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    errors = pool.run(refused, str(pair), dp=2)
    assert errors[0] == errors[1] and "low.train.bin has changed" in errors[0]


def test_a_pair_that_cannot_be_written_is_named(
    tokenizer: Path, lines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = lines("a.jsonl", '{"text": "w1"}')
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device", "disk")))
    with pytest.raises(FileError, match=r"cannot be written: No space left on device\. Make room"):
        prepare([source], tokenizer, tmp_path / "out" / "a", validation=0)
    assert list((tmp_path / "out").iterdir()) == []
