"""Pairs that cannot be trained on are refused by their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_megatron.align.pairs import PairFile, save_arrays, tokenize_pairs
from minitron_megatron.data import PreferencePair
from minitron_megatron.errors import DataError, FileError


def pair(prompt: int = 2, chosen: list[int] | None = None, rejected: list[int] | None = None) -> PreferencePair:
    """Return a pair with a prompt of some tokens and without rewards."""
    responses = (np.array(ids) for ids in (chosen or [1, 2, 3], rejected or [1, 2, 4]))
    return PreferencePair(np.zeros(prompt, np.int64), *responses, None, "a.jsonl:1")


@pytest.mark.parametrize(
    ("pairs", "options", "said"),
    [
        (
            [pair()] * 2,
            {"held_out": 0.99},
            "The sources hold 2 preference pairs, and 2 are held out: none is left to train on. Give more pairs, or "
            "hold out fewer.",
        ),
        (
            [],
            {"held_out": 0},
            "The sources hold 0 preference pairs, and 0 are held out: none is left to train on. Give more pairs, or "
            "hold out fewer.",
        ),
        (
            [pair()],
            {"sequence": 3},
            "a.jsonl:1 has responses that are equal in the first 2 tokens, which is all that is read at a sequence of "
            "3. Remove the pair, or set a longer `sequence`.",
        ),
        (
            [pair(prompt=10)],
            {},
            "a.jsonl:1 has a prompt of 10 tokens, and samples have 8. Remove the pair, or set a longer `sequence`.",
        ),
        (
            [pair(chosen=[1, 99])],
            {},
            "a.jsonl:1 has the token 99, and the model has 10 entries. Remove the token from the text, or use the "
            "tokenizer that came with the model.",
        ),
        (
            [pair()],
            {"rewarded": True},
            "a.jsonl:1 has no rewards, which this loss needs. Add chosen_reward and rejected_reward, or train by dpo.",
        ),
    ],
)
def test_pairs_that_cannot_be_trained_on(
    pairs: list[PreferencePair], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    defaults: dict[str, Any] = {"sequence": 8, "vocab": 10, "rewarded": False, "held_out": 0.0, "seed": 1}
    with pytest.raises(DataError) as caught:
        tokenize_pairs(pairs, tmp_path / "pairs", **defaults | options)
    assert str(caught.value) == said
    assert not list(tmp_path.iterdir())


def test_a_file_that_holds_no_pairs_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "pairs.safetensors"
    ends, flags = np.array([[1, 2, 3]]), np.zeros(1, np.uint8)
    save_arrays(file, tokens=np.zeros(2, np.int32), ends=ends, rewards=np.zeros((1, 2)), held_out=flags)
    with pytest.raises(FileError) as caught:
        PairFile(file)
    assert str(caught.value) == f"{file} holds no pairs. Remove it, and run the command again."
    file.write_bytes(b"torn")
    with pytest.raises(FileError, match=rf"^{file} cannot be read: .+\. Remove it, and run the command again\.$"):
        PairFile(file)
