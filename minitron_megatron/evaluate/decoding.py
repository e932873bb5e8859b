"""Decoding rules that reproduce transformers' `generate` as lm-evaluation-harness calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import DataError
from ..files import read_json

__all__ = ["Decoding", "TransformersTokenizer", "decoding", "generation_settings", "stopper"]

TOP_K = 50
"""transformers' default for sampling."""

UNSUPPORTED: Mapping[str, tuple[float, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "custom_generate": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
"""Setting of `generate` that is not supported -> its harmless values besides null."""

UNSUPPORTED_SAMPLING: Mapping[str, tuple[float, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
}

SUPPORTED = {
    *("eos_token_id", "max_new_tokens", "min_new_tokens", "min_length", "no_repeat_ngram_size", "repetition_penalty"),
    *("suppress_tokens", "temperature", "top_k", "top_p", "do_sample", "until", "max_gen_toks"),
}
"""Supported settings of a task; generation_config.json may have all except the last two."""
HARMLESS = {"use_cache", "pad_token_id", "bos_token_id", "early_stopping", "length_penalty"}
"""Further settings of a task; without beams and padding they change nothing."""


class TransformersTokenizer(Protocol):
    """Interface of transformers' tokenizers, as far as evaluation uses it."""

    name_or_path: str
    bos_token: str | None
    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: int | Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: object) -> object: ...


@dataclass(frozen=True)
class Decoding:
    """Rules for choosing the next token, from generation_config.json and a task's `generation_kwargs`."""

    ends: frozenset[int]
    """Ids of tokens that end an answer."""
    most: int | None
    """`max_new_tokens` of generation_config.json; in transformers it overrides the length that the harness requests."""
    temperature: float
    """0 means greedy decoding."""
    top_k: int
    top_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    min_new_tokens: int
    min_length: int
    """Least number of tokens, prompt included, before an end token is allowed."""
    suppressed: tuple[int, ...]

    @property
    def adjust(self) -> Callable[[Sequence[int], int, Tensor], Tensor] | None:
        """Function (tokens so far, number of new ones, logits [vocab]) -> logits; None if nothing is adjusted."""
        plain = self.repetition_penalty == 1 and not self.no_repeat_ngram_size and not self.suppressed
        return None if plain and not self.min_new_tokens and not self.min_length else self._adjusted

    def _adjusted(self, tokens: Sequence[int], new: int, logits: Tensor) -> Tensor:
        logits = logits.clone()
        if self.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(tokens)), device=logits.device)
            before = logits[seen]
            logits[seen] = torch.where(before < 0, before * self.repetition_penalty, before / self.repetition_penalty)
        banned = [*self.suppressed, *_repeats(tokens, self.no_repeat_ngram_size)]
        if new < self.min_new_tokens or len(tokens) < self.min_length:
            banned += self.ends
        logits[[each for each in banned if each < len(logits)]] = -torch.inf
        return logits


def _repeats(tokens: Sequence[int], size: int) -> list[int]:
    """Return the tokens that would repeat an n-gram of the text."""
    if not size or len(tokens) + 1 < size:
        return []
    last = tuple(tokens[len(tokens) - size + 1 :])
    return [tokens[at + size - 1] for at in range(len(tokens) - size + 1) if tuple(tokens[at : at + size - 1]) == last]


def generation_settings(folder: Path) -> dict[str, object]:
    """Return a folder's generation settings as transformers does: from generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        if (path := folder / name).is_file():
            settings = read_json(path)
            if not isinstance(settings, dict):
                raise DataError(f"{path} is not a JSON object. Copy it again.")
            return {key: value for key, value in settings.items() if key != "max_length"}
    return {}


def decoding(settings: Mapping[str, object], options: Mapping[str, Any], source: str) -> Decoding:
    """Return the decoding rules from a folder's settings and a task's options, as normalised by the harness.

    source: the folder, for messages. Raises DataError for settings that are not supported.
    """
    unknown = options.keys() - SUPPORTED - HARMLESS - UNSUPPORTED.keys() - UNSUPPORTED_SAMPLING.keys()
    if unknown:
        raise DataError(
            f"generation_kwargs of a task hold {min(unknown)}, which transformers' `generate` does not know. "
            "Leave the task out."
        )
    temperature = float(options.get("temperature", 0.0))
    combined = {**settings, **options}
    refused = {**UNSUPPORTED, **(UNSUPPORTED_SAMPLING if temperature else {})}
    for key, harmless in refused.items():
        if (value := combined.get(key)) is not None and value not in harmless:
            raise DataError(
                f"generation_config.json of {source}, or a task, sets {key} to {value!r}, which is not supported here. "
                "Remove it, or leave out tasks that generate text."
            )
    read = _SettingsReader(combined, source)
    most = _SettingsReader(settings, source).number("max_new_tokens", 0)
    return Decoding(
        ends=frozenset(read.ids("eos_token_id")),
        most=int(most) or None,
        temperature=temperature,
        top_k=int(read.number("top_k", TOP_K)),
        top_p=read.number("top_p", 1.0),
        repetition_penalty=read.number("repetition_penalty", 1.0),
        no_repeat_ngram_size=int(read.number("no_repeat_ngram_size", 0)),
        min_new_tokens=int(read.number("min_new_tokens", 0)),
        min_length=int(read.number("min_length", 0)),
        suppressed=tuple(read.ids("suppress_tokens")),
    )


@dataclass(frozen=True)
class _SettingsReader:
    settings: Mapping[str, Any]
    source: str

    def number(self, key: str, default: float) -> float:
        value = self.settings.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise DataError(f"{key} is {value!r} in the generation settings of {self.source}. Set it to a number >= 0.")
        return value

    def ids(self, key: str) -> list[int]:
        value = self.settings.get(key)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(each, bool) or not isinstance(each, int) for each in found):
            raise DataError(
                f"{key} is {value!r} in the generation settings of {self.source}. Set it to a token id or a list."
            )
        return found


def stopper(
    tokenizer: TransformersTokenizer, strings: Sequence[str], ends: frozenset[int]
) -> Callable[[Sequence[int]], bool]:
    """Return a function (tokens of the answer so far) -> whether the answer is complete.

    It decides as transformers and the harness do. The harness looks for a stop string only in the last tokens: the
    string's own number of tokens plus two. These are decoded with special tokens, which can therefore be stop strings.
    """
    windows: dict[int, list[str]] = {}
    for string in strings:
        windows.setdefault(len(tokenizer.encode(string, add_special_tokens=False)) + 2, []).append(string)

    def stop(made: Sequence[int]) -> bool:
        if made[-1] in ends:
            return True
        for size, candidates in windows.items():
            text = tokenizer.decode(made[-size:])
            if any(string in text for string in candidates):
                return True
        return False

    return stop
