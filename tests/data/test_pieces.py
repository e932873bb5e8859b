"""A long text is tokenized in pieces, to the tokens of the whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minitron_megatron.data import pieces as module
from minitron_megatron.data.encode import Encoder
from minitron_megatron.data.pieces import pieces

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    *("the", "a", "Ünter", "don't", "it's", "x2", "12345", "...", "e\u0301", "<end>", "\U0001f600", "-"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t"),
]


def drawn(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(["", " ", " ", "\n"]) for _ in range(words))


def trained(tokenizer: Tokenizer) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([drawn(seed, 300) for seed in range(100, 110)], trainer)
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_level(split: Callable[[], object] | None, prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    steps = [split()] if split else []
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not split)]
    )
    return trained(made)


def sentencepiece(split: bool) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    if split:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Metaspace()
    return trained(made)


def stripped() -> Tokenizer:
    made = byte_level(None)
    made.normalizer = normalizers.Strip()
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(None),
    "gpt2 with a space before": lambda: byte_level(None, prefix=True),
    "llama3": lambda: byte_level(lambda: pre_tokenizers.Split(Regex(LLAMA3), "isolated")),
    "stripped": stripped,
    "metaspace": lambda: sentencepiece(split=True),
    "llama2": lambda: sentencepiece(split=False),
}
UNCUT = ("stripped", "llama2")
"""Tokenizers of which a token may depend on where a text begins, or on all of it."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = KINDS[kind]()
    texts = [drawn(seed, 1000) for seed in range(4)]
    whole = [[*tokenizer.encode(text, add_special_tokens=False).ids, 7] for text in texts]
    for name, value in (("LONG", 300), ("WINDOW", 50), ("TRIES", 20)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("minitron_megatron.data.encode.LONG", 300)
    cut = [list(pieces(text, tokenizer)) for text in texts]
    assert ["".join(each) for each in cut] == texts
    counts = [len(each) for each in cut]
    assert max(counts) == 1 if kind in UNCUT else min(counts) > 5, counts
    assert [ids.tolist() for [ids] in Encoder(tokenizer, 7, "uint16")(["short", *texts])][1:] == whole


def test_what_has_no_place_for_a_cut_is_whole(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG", 10)
    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for text in ("1" * 100, "a" * 100, "", "a b"):
        assert list(pieces(text, reader)) == [text]
