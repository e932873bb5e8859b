"""A step reads the same samples at every layout, shuffled by the seed; calibration draws without repetition."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_megatron.data import Corpus, calibration, calibration_batches, held_out_batches, step_batches
from minitron_megatron.data.cache import write_once
from minitron_megatron.errors import DataError, RecipeError
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

Corpora = tuple[str, str]
SEQUENCE = 8


def stream(prefix: str, split: str = "train") -> list[int]:
    return np.fromfile(f"{prefix}.{split}.bin", np.uint16).tolist()


def pieces(tokens: list[int]) -> list[str]:
    """Return the parts between end tokens, each with spaces around every number, so that `in` finds whole numbers."""
    return [f" {piece.strip()} " for piece in f" {' '.join(map(str, tokens))} ".split(" 0 ") if piece.strip()]


def rows(corpus: Corpus) -> list[tuple[int, ...]]:
    return [tuple(corpus[i][0].tolist()) for i in range(len(corpus))]


def open_corpus(prefix: str, cache: Path, samples: int = 40, seed: int = 3, split: str = "train") -> Corpus:
    return Corpus([(prefix, 1.0)], split, sequence=SEQUENCE, samples=samples, seed=seed, cache=cache)


def test_a_sample_is_a_window_of_whole_documents_and_labels_are_the_next_tokens(
    corpora: Corpora, tmp_path: Path
) -> None:
    corpus = open_corpus(corpora[0], tmp_path)
    documents = pieces(stream(corpora[0]))
    assert len(corpus) == 40
    for i in range(len(corpus)):
        tokens, labels, mask, _ = corpus[i]
        assert tokens.dtype == labels.dtype == torch.int64 and mask.dtype == torch.bool and mask.all()
        assert tokens.shape == labels.shape == mask.shape == (SEQUENCE,)
        assert tokens[1:].equal(labels[:-1])
        window = pieces([*tokens.tolist(), int(labels[-1])])
        assert all(any(piece in document for document in documents) for piece in window)
    with pytest.raises(IndexError):
        corpus[40]


def test_the_order_is_the_seeds_and_the_caches_place_does_not_matter(corpora: Corpora, tmp_path: Path) -> None:
    first = rows(open_corpus(corpora[0], tmp_path / "a"))
    assert first == rows(open_corpus(corpora[0], tmp_path / "a"))
    assert first == rows(open_corpus(corpora[0], tmp_path / "b"))
    assert first != rows(open_corpus(corpora[0], tmp_path / "a", seed=4))
    held_out = {word for row in rows(open_corpus(corpora[0], tmp_path / "a", split="valid")) for word in row}
    assert held_out <= set(stream(corpora[0], "valid"))
    assert held_out & {word for row in first for word in row} == {0}


def test_a_corpus_prepared_anew_is_not_read_by_its_old_index(corpora: Corpora, tmp_path: Path) -> None:
    for kind in ("bin", "idx"):
        shutil.copy(f"{corpora[0]}.train.{kind}", tmp_path / f"x.train.{kind}")
    open_corpus(str(tmp_path / "x"), tmp_path / "cache")
    for kind in ("bin", "idx"):
        shutil.copy(f"{corpora[0]}.valid.{kind}", tmp_path / f"x.train.{kind}")
    corpus = open_corpus(str(tmp_path / "x"), tmp_path / "cache")
    assert {word for row in rows(corpus) for word in row} <= set(stream(corpora[0], "valid"))


def test_the_order_is_that_of_megatrons_own_builder(corpora: Corpora, tmp_path: Path, pool: Pool) -> None:
    assert pool.run(as_megatron_orders, corpora, str(tmp_path)) == [True]


def as_megatron_orders(topology: Topology, corpora: Corpora, folder: str) -> bool:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from minitron_megatron.data.corpus import STAND_IN

    config = GPTDatasetConfig(
        random_seed=3,
        sequence_length=SEQUENCE,
        blend_per_split=[([f"{prefix}.train" for prefix in corpora], [3.0, 1.0]), None, None],
        path_to_cache=f"{folder}/expected",
        tokenizer=STAND_IN,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    expected = BlendedMegatronDatasetBuilder(GPTDataset, [60, 0, 0], lambda: True, config).build()[0]
    blend = list(zip(corpora, [3.0, 1.0], strict=True))
    corpus = Corpus(blend, sequence=SEQUENCE, samples=60, seed=3, cache=f"{folder}/corpus")
    return rows(corpus) == [tuple(expected[i]["tokens"].tolist()) for i in range(60)]


def test_a_blend_keeps_its_weights_at_every_point(corpora: Corpora, tmp_path: Path) -> None:
    corpus = Corpus([(corpora[0], 3), (corpora[1], 1)], sequence=SEQUENCE, samples=80, seed=0, cache=tmp_path)
    from_high = np.cumsum([max(row) > 1000 for row in rows(corpus)])
    assert np.abs(from_high - np.arange(1, 81) / 4).max() <= 1


@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
def test_a_steps_samples_are_the_same_at_any_layout(
    dp: int, micro_batch: int, corpora: Corpora, tmp_path: Path
) -> None:
    corpus = open_corpus(corpora[0], tmp_path)
    for step in range(len(corpus) // 8):
        seen = []
        for dp_rank in range(dp):
            batches = step_batches(corpus, step, global_batch=8, micro_batch=micro_batch, dp_rank=dp_rank, dp=dp)
            assert [batch.tokens.shape for batch in batches] == [(micro_batch, SEQUENCE)] * (8 // dp // micro_batch)
            assert all(batch.labels.shape == batch.mask.shape == batch.tokens.shape for batch in batches)
            seen += [tuple(row) for batch in batches for row in batch.tokens.tolist()]
        assert sorted(seen) == sorted(rows(corpus)[step * 8 : step * 8 + 8])


@pytest.mark.parametrize(
    ("global_batch", "message"), [(10, "multiple of 8, such as 8 or 16"), (4, r"multiple of 8, such as 8\.$")]
)
def test_a_global_batch_that_cannot_be_split_names_those_that_can(
    global_batch: int, message: str, corpora: Corpora, tmp_path: Path
) -> None:
    corpus = open_corpus(corpora[0], tmp_path)
    with pytest.raises(RecipeError, match=f"^global_batch is {global_batch}, which cannot be split.*{message}"):
        step_batches(corpus, 0, global_batch=global_batch, micro_batch=4, dp_rank=0, dp=2)


def test_calibration_draws_different_sequences_and_shares_them_out(corpora: Corpora, tmp_path: Path) -> None:
    held = (len(stream(corpora[0])) - 1) // SEQUENCE
    corpus = calibration([(corpora[0], 1.0)], samples=held, sequence=SEQUENCE, seed=5, cache=tmp_path)
    words = np.array(rows(corpus)).ravel()
    epoch = np.array(stream(corpora[0]))
    counts, whole = (np.bincount(values, minlength=100) for values in (words, epoch))
    assert (counts <= whole).all() and len(words) > len(
        epoch
    ) - SEQUENCE - 1  # each token at most once, nearly all of them
    with pytest.raises(DataError, match=rf"holds {held} different sequences of 8 tokens .* and {held + 1} are needed"):
        calibration([(corpora[0], 1.0)], samples=held + 1, sequence=SEQUENCE, seed=5, cache=tmp_path)

    few = calibration([(corpora[0], 1.0)], samples=24, sequence=SEQUENCE, seed=5, cache=tmp_path)
    shares = [calibration_batches(few, micro_batch=3, dp_rank=rank, dp=2) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4]
    seen = [tuple(row) for share in shares for batch in share for row in batch.tokens.tolist()]
    assert sorted(seen) == sorted(rows(few))
    with pytest.raises(RecipeError, match=r"^samples is 24, which cannot be split.*multiple of 10, such as 20 or 30"):
        calibration_batches(few, micro_batch=5, dp_rank=0, dp=2)


def test_training_reads_a_small_corpus_again_in_another_order(corpora: Corpora, tmp_path: Path) -> None:
    held = (len(stream(corpora[0])) - 1) // SEQUENCE
    corpus = open_corpus(corpora[0], tmp_path, samples=3 * held)
    read = rows(corpus)
    assert len(read) == 3 * held and read[:held] != read[held : 2 * held]


def test_corpora_that_cannot_be_read_are_refused(corpora: Corpora, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no .*nowhere\.train\.idx"):
        open_corpus(str(tmp_path / "nowhere"), tmp_path)
    few = r"holds 0 different sequences of 5,000 tokens .* and 1 are needed\. Use fewer tokens or less of this"
    with pytest.raises(DataError, match=few):
        Corpus([(corpora[0], 1.0)], sequence=5000, samples=1, seed=0, cache=tmp_path)
    for weights in ((), (0.0,), (1.0, -1.0)):
        with pytest.raises(
            DataError, match=r"^The weights .* are not all finite and above 0\. Give each corpus one that is\."
        ):
            Corpus([(corpora[0], w) for w in weights], sequence=8, samples=1, seed=0, cache=tmp_path)


@pytest.mark.parametrize("damage", ["missing bin", "empty bin", "torn bin", "torn idx", "foreign idx", "empty idx"])
def test_a_damaged_pair_is_refused(damage: str, corpora: Corpora, tmp_path: Path) -> None:
    for kind in ("bin", "idx"):
        shutil.copy(f"{corpora[0]}.train.{kind}", tmp_path / f"x.train.{kind}")
    what, kind = damage.split()
    victim = tmp_path / f"x.train.{kind}"
    if what == "missing":
        victim.unlink()
    else:
        whole = victim.read_bytes()
        victim.write_bytes({"empty": b"", "torn": whole[:-10], "foreign": b"x" * len(whole)}[what])
    with pytest.raises(DataError, match="Prepare the corpus"):
        open_corpus(str(tmp_path / "x"), tmp_path / "cache")


def test_what_a_killed_run_left_in_the_cache_is_not_read(corpora: Corpora, tmp_path: Path) -> None:
    whole = rows(open_corpus(corpora[0], tmp_path))
    (folder,) = tmp_path.iterdir()
    torn = folder.rename(f"{folder}.partial")
    for file in torn.iterdir():
        file.write_bytes(file.read_bytes()[:-10])
    assert rows(open_corpus(corpora[0], tmp_path)) == whole
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_refused(corpora: Corpora, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^The index of samples cannot be written: .*file.* Set another cache\.$"):
        open_corpus(corpora[0], tmp_path / "file" / "cache")
    said = rf"^Not every rank sees {tmp_path}/here, which rank 0 wrote\. Set cache to a shared file system\.$"
    with pytest.raises(DataError, match=said):
        write_once(tmp_path / "here", lambda folder: None, first_rank=False)


def read_share(topology: Topology, corpora: Corpora, cache: str) -> list[list[int]]:
    corpus = Corpus([(corpora[0], 3), (corpora[1], 1)], sequence=SEQUENCE, samples=32, seed=1, cache=cache)
    batches = [
        batch
        for step in range(4)
        for batch in step_batches(corpus, step, global_batch=8, micro_batch=2, dp_rank=topology.dp_rank, dp=topology.dp)
    ]
    return [row for batch in batches for row in batch.tokens.tolist()]


def fail_on_the_other_rank(topology: Topology, corpora: Corpora, folder: str) -> None:
    open_corpus(corpora[topology.rank] if topology.rank == 0 else f"{folder}/nowhere", Path(folder))


@pytest.mark.parametrize("dp", [1, 2])
def test_several_ranks_build_one_index_and_read_what_one_reads(
    dp: int, corpora: Corpora, tmp_path: Path, pool: Pool
) -> None:
    alone = Corpus([(corpora[0], 3), (corpora[1], 1)], sequence=SEQUENCE, samples=32, seed=1, cache=tmp_path / "alone")
    shares = pool.run(read_share, corpora, str(tmp_path / "cache"), dp=dp, tp=2 // dp)
    if dp == 1:
        assert shares[0] == shares[1]  # tensor-parallel ranks read the same samples
        shares = shares[:1]
    assert sorted(tuple(row) for share in shares for row in share) == sorted(rows(alone))
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_one_ranks_missing_corpus_is_every_ranks_error(corpora: Corpora, tmp_path: Path, pool: Pool) -> None:
    with pytest.raises(DataError, match="nowhere"):
        pool.run(fail_on_the_other_rank, corpora, str(tmp_path), dp=2)


@pytest.mark.parametrize(("samples", "micro_batch", "dp"), [(7, 2, 1), (7, 2, 2), (1, 2, 2), (8, 1, 4), (5, 4, 1)])
def test_every_held_out_sample_counts_once_at_any_split(
    corpora: Corpora, tmp_path: Path, samples: int, micro_batch: int, dp: int
) -> None:
    corpus = open_corpus(corpora[0], tmp_path, samples, split="valid")
    ranks = [held_out_batches(corpus, micro_batch=micro_batch, dp_rank=rank, dp=dp) for rank in range(dp)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert {len(batch.tokens) for batch in batches} == {micro_batch}
    counted = [tuple(row.tolist()) for batch in batches for row in batch.tokens[batch.mask.all(1)]]
    assert counted == rows(corpus)
    assert sum(int(batch.mask.sum()) for batch in batches) == samples * SEQUENCE


def test_documents_are_separate_with_an_end_token(corpora: Corpora, tmp_path: Path) -> None:
    """Each token has its document's number; the loss does not count where the next token is of another document."""
    ended = Corpus([(corpora[0], 1.0)], sequence=SEQUENCE, samples=40, seed=3, cache=tmp_path, end=0)
    plain = open_corpus(corpora[0], tmp_path)
    assert rows(ended) == rows(plain)
    batches = [step_batches(each, 0, global_batch=40, micro_batch=40, dp_rank=0, dp=1)[0] for each in (ended, plain)]
    separate, joined = batches
    assert joined.attention_context is None and joined.mask.all()
    assert separate.mask.equal(separate.tokens != 0) and not separate.mask.all()
    for tokens, documents in zip(separate.tokens.tolist(), separate.attention_context.documents.tolist(), strict=True):
        numbers, number = [], 0
        for token in tokens:
            numbers.append(number)
            number += token == 0
        assert documents == numbers
    held_out = held_out_batches(ended, micro_batch=3, dp_rank=0, dp=1)
    assert all(
        batch.attention_context is not None and not (batch.mask & (batch.tokens == 0)).any() for batch in held_out
    )
