"""A `.bin/.idx` pair of megatron-core's builder is used where it lies, and its classes read what is prepared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron_megatron.data import Corpus, check_content, most_bytes, places, prepare
from minitron_megatron.data.token_files import find_token_files
from minitron_megatron.errors import DataError
from tests.data.test_prepare import stored

Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that writes documents, lists of sequences, with megatron-core's own builder."""

    def write(documents: list[list[list[int]]], name: str = "own_text_document", dtype: Any = np.uint16) -> Path:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        prefix = tmp_path / "corpora" / name
        prefix.parent.mkdir(exist_ok=True)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
        for document in documents:
            for sequence in document:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


def whole(count: int = 80) -> list[list[list[int]]]:
    """Return documents of two sequences; document i holds i + 1 alone, and ends with 0."""
    return [[[i + 1] * (3 + i % 5), [i + 1] * 4 + [0]] for i in range(count)]


def samples(prefix: Path, split: str = "train", **options: Any) -> Corpus:
    keys = {"sequence": 8, "samples": 20, "seed": 1, "cache": prefix.parent / "cache"}
    return Corpus([(prefix, 1.0)], split, **keys | options)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_nothing_is_copied_and_documents_are_held_out_whole(
    suffix: str, build: Build, tokenizer: Path, tmp_path: Path
) -> None:
    pair = build(whole())
    made = prepare([f"{pair}{suffix}"], tokenizer, tmp_path / "out" / "a", validation=0.25, seed=3, vocab=3001)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.train.json", "a.valid.json"]
    assert made.valid and made.end == 0 and made.train.documents + made.valid.documents == 80
    assert made.train.tokens + made.valid.tokens == sum(len(s) for document in whole() for s in document)
    assert 10 < made.valid.documents < 30
    seen = {}
    for split, part in (("train", made.train), ("valid", made.valid)):
        corpus = samples(tmp_path / "out" / "a", split, samples=(part.tokens - 1) // 8)
        words = torch.cat([corpus[i][0] for i in range(len(corpus))])
        counts = torch.bincount(words, minlength=81)
        seen[split] = set(words.tolist()) - {0}
        assert all(counts[i] <= 7 + (i - 1) % 5 for i in range(1, 81))
    assert not seen["train"] & seen["valid"]
    check_content(tmp_path / "out" / "a", made.content)
    again = prepare([pair], tokenizer, tmp_path / "out" / "b", validation=0.25, seed=3)
    other = prepare([pair], tokenizer, tmp_path / "out" / "c", validation=0.25, seed=4)
    assert again.content == made.content != other.content


def test_a_pair_in_place_gives_the_samples_of_the_same_text(build: Build, tokenizer: Path, tmp_path: Path) -> None:
    texts = [f"w{1 + i} " * (1 + i % 9) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "text", validation=0)
    pair = build([[[1 + i] * (1 + i % 9) + [0]] for i in range(60)])
    prepare([pair], tokenizer, tmp_path / "place", validation=[pair])
    one, other, valid = samples(tmp_path / "text"), samples(tmp_path / "place"), samples(tmp_path / "place", "valid")
    assert all(torch.equal(one[i][0], other[i][0]) for i in range(20)) and len(valid) == 20
    assert Path(f"{pair}.bin").read_bytes() == (tmp_path / "text.train.bin").read_bytes()
    assert Path(f"{pair}.idx").read_bytes() == (tmp_path / "text.train.idx").read_bytes()
    prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "place", validation=0)  # and back
    assert find_token_files(tmp_path / "place", "train").prefix == tmp_path / "place.train"


def test_what_is_prepared_is_read_by_megatrons_own_classes(tokenizer: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"w{1 + i} " * 9}) + "\n" for i in range(60)))
    prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "a", validation=0.2)
    assert sum(map(len, stored(tmp_path / "a.train"))) == (tmp_path / "a.train.bin").stat().st_size // 2
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend_per_split=[([str(tmp_path / "a.train")], None), ([str(tmp_path / "a.valid")], None), None],
        tokenizer=__import__("types").SimpleNamespace(vocab_size=3001, eod=0, unique_identifiers={}),
        path_to_cache=str(tmp_path / "cache"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [20, 4, 0], lambda: True, config).build()
    assert len(train) >= 20 and len(valid) >= 4 and train[0]["tokens"].shape == (8,)
    ours = samples(tmp_path / "a")
    assert all(torch.equal(ours[i][0], train[i]["tokens"]) for i in range(20))


def test_changes_after_the_check_are_found(build: Build, tokenizer: Path, tmp_path: Path) -> None:
    pair = build(whole())
    prepare([pair], tokenizer, tmp_path / "a", validation=0.2)
    content = Path(f"{pair}.bin").read_bytes()
    Path(f"{pair}.bin").write_bytes(content[:100] + b"\x07\x07" + content[102:])
    with pytest.raises(DataError, match=r"own_text_document.bin has changed since it was written, between"):
        samples(tmp_path / "a")
    build(whole(79))
    with pytest.raises(DataError, match=r"a.train.json holds no checksums of|own_text_document.idx has changed"):
        samples(tmp_path / "a")
    Path(f"{pair}.bin").unlink()
    with pytest.raises(DataError, match=r"a.train.json holds no checksums of .*own_text_document.bin"):
        samples(tmp_path / "a")


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "another tokenizer's ids": (
        [[[5, 3500, 0]]],
        {},
        r"holds the token 3500, and tokenizer and model have 3,001 entries in common. Tokenize the text again",
    ),
    "an id that the model lacks": ([[[5, 60, 0]]], {"vocab": 50}, r"the token 60 \('w60'\), .* have 50 entries"),
    "negative ids": ([[[5, -6, 0]]], {"dtype": np.int32}, "holds the token -6"),
    "another end": (
        [[[5, 7, 2999]], [[8, 2999]], [[8, 0]]],
        {},
        r"do not end with the tokenizer's end-of-document token .*\(0\), but most often with 2999.*--append-eod",
    ),
    "a type that is too small": ([[[5, 7, 0]]], {"dtype": np.uint8}, "holds tokens of type uint8, .* 3,001 entries"),
    "floats": ([[[5, 7, 0]]], {"dtype": np.float32}, "not of an integer type"),
    "a share of nothing": (
        [[[5, 7, 0]]],
        {"validation": 1e-9},
        r"`validation` 1e-09 leaves no document for the valid split of .*\. Set a larger fraction, or name another",
    ),
    "no share": (
        [[[5, 7, 0]]],
        {"validation": 1.5},
        r"`validation` 1\.5 is not a fraction of the documents\. Give 0, a",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_pair_that_does_not_fit_is_refused(case: str, build: Build, tokenizer: Path, tmp_path: Path) -> None:
    documents, options, message = WRONG[case]
    pair = build(documents, dtype=options.pop("dtype", np.uint16))
    with pytest.raises(DataError, match=message):
        prepare([pair], tokenizer, tmp_path / "out" / "a", **{"validation": 0} | options)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_pair_is_a_source_of_its_own(build: Build, tokenizer: Path, tmp_path: Path) -> None:
    pair, other = build(whole()), build(whole(), "other")
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}')
    for sources, held_out in (([pair, other], 0), ([tmp_path / "a.jsonl", pair], 0), ([pair], [tmp_path / "a.jsonl"])):
        with pytest.raises(DataError, match=r"mixes a tokenized corpus with others. Make each .bin/.idx pair a source"):
            prepare(sources, tokenizer, tmp_path / "out", validation=held_out)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"mixes a tokenized corpus"):
        prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", validation=[pair])
    with pytest.raises(DataError) as caught:
        prepare([pair], tokenizer, tmp_path / "out", validation=0, chat="all")
    assert str(caught.value) == f"{pair} is tokenized and holds no chats. Set the format of the source to text."
    assert places([pair]) == [Path(f"{pair}.idx"), Path(f"{pair}.bin")]
    assert most_bytes([pair]) == Path(f"{pair}.bin").stat().st_size
    Path(f"{pair}.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"own_text_document.bin is empty. Copy or tokenize it again"):
        prepare([pair], tokenizer, tmp_path / "out", validation=0)
    Path(f"{pair}.bin").unlink()
    with pytest.raises(DataError, match=r"there is no .*own_text_document.bin. Name the prefix"):
        prepare([pair], tokenizer, tmp_path / "out", validation=0)
