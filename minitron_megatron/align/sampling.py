"""Answers to prompts, sampled from a model at any layout, and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

from ..data import ChatCodec, PromptRecord, Sources
from ..errors import DataError, RecipeError, did_you_mean
from ..evaluate import Decoding, Predictor, Sampling, decoding, generation_settings
from ..events import Listener, silent
from ..settings import (
    AfterValidator,
    Count,
    Field,
    FilePath,
    HowToRun,
    Positive,
    Settings,
    Steps,
    model_validator,
)
from .rewards import REWARDS

__all__ = ["COLUMN", "MODEL", "AnswerSettings", "decoding_rules", "prompt_ids", "sample_answers"]

MODEL, COLUMN = "model", "column"
"""Rewards besides those of REWARDS: a reward model's, and those that the records hold already."""


def _reward(name: str) -> str:
    if name in (MODEL, COLUMN) or name in REWARDS:
        return name
    known = [*REWARDS, MODEL, COLUMN]
    raise ValueError(f"There is no such reward.{did_you_mean(name, known)} Known: {', '.join(known)}")


class AnswerSettings(Settings):
    """Answers of the model to prompts, from which preference pairs are chosen by reward: the best and the worst answer
    to each prompt."""

    prompts: Sources
    """File, folder, glob, data set of the Hub, or a list of them. Each record has a `prompt`, text or messages, and
    what its reward needs."""
    reward: Annotated[str, AfterValidator(_reward), Field(examples=[*REWARDS, MODEL, COLUMN])] = "answer"
    """Reward of an answer: `answer`, 1 if its final answer equals the record's `answer`; `code`, 1 if its Python passes
    the record's `tests` (runs code); `model`, the logit of `reward_model`; `column`, where records hold `responses` and
    `rewards`, so that nothing is sampled; or the name of a plugin's reward."""
    reward_model: FilePath | None = None
    """Hugging Face folder of a sequence-classification model with one logit, for `reward: model`."""
    answers: Annotated[Count, Field(ge=2)] = 4
    """Answers sampled per prompt."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the most likely tokens that together have this probability."""
    top_k: Steps = 0
    """Sample from so many most likely tokens; 0: from all."""
    max_tokens: Count = 512
    """Tokens of an answer at most."""
    limit: Count | None = None
    """Number of prompts, from the first. Default: all."""
    micro_batch: HowToRun[Count] = 8
    """Answers per forward pass of one data-parallel rank."""

    @property
    def samples(self) -> bool:
        """Whether a model answers; false where the records hold responses."""
        return self.reward != COLUMN

    @property
    def paths(self) -> tuple[str, ...]:
        """All places of the prompts."""
        return (self.prompts,) if isinstance(self.prompts, str) else self.prompts

    @model_validator(mode="after")
    def _fits_the_reward(self) -> Self:
        if (self.reward == MODEL) != (self.reward_model is not None):
            raise ValueError("reward_model is given if and only if reward is model: add or remove one of them")
        sampling = ("answers", "temperature", "top_p", "top_k", "max_tokens")
        given = [key for key in sampling if getattr(self, key) != type(self).model_fields[key].default]
        if given and not self.samples:
            raise ValueError(f"reward: column samples nothing, so {given[0]} cannot apply: remove it")
        return self


def decoding_rules(folder: Path, settings: AnswerSettings, ends: frozenset[int]) -> Decoding:
    """Return the rules of decoding: a folder's generation settings, with the given sampling in place of their own.

    ends: further ids of tokens that end an answer. Raises DataError for generation settings that are not supported.
    """
    options = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
    rules = decoding(generation_settings(folder), options, str(folder))
    return replace(rules, ends=rules.ends | ends)


def prompt_ids(
    prompts: Sequence[PromptRecord], codec: ChatCodec, *, vocab: int, context: int, max_tokens: int
) -> list[list[int]]:
    """Return the token ids of each prompt, up to where the answer begins.

    vocab, context: the model's numbers of embeddings and positions. Raises DataError, which names the place, for a
    prompt that leaves no room for an answer or has a token that the model lacks.
    """
    if max_tokens >= context:
        raise RecipeError(f"`max_tokens` is {max_tokens}, and the model has {context} positions. Lower it.")
    found = []
    for prompt in prompts:
        ids = codec.prompt(prompt)
        if len(ids) > (room := context - max_tokens):
            raise DataError(
                f"{prompt.place} has {len(ids)} tokens, and the model's {context} positions leave {room} besides an "
                f"answer of {max_tokens}. Shorten or remove the prompt, or lower `max_tokens`."
            )
        if max(ids) >= vocab:
            raise DataError(
                f"{prompt.place} has the token {codec.tokenizer.id_to_token(max(ids))!r}, whose id is {max(ids)}, but "
                f"the model has {vocab} embeddings. Use the tokenizer that came with the model."
            )
        found.append(ids)
    return found


def sample_answers(
    predictor: Predictor,
    prompts: Sequence[Sequence[int]],
    rules: Decoding,
    *,
    answers: int,
    max_tokens: int,
    seed: int,
    first: int = 0,
    listener: Listener = silent,
) -> list[list[list[int]]]:
    """Return the token ids of `answers` answers to each prompt, with the token that ends them if one did.

    Collective over the world, with all results on every rank. An answer's random choices depend only on the seed, its
    prompt's number (from `first`) and its own number, and on no layout.
    """
    keys = [(first + number, answer) for number in range(len(prompts)) for answer in range(answers)]
    made = predictor.continuations(
        [prompt for prompt in prompts for _ in range(answers)],
        max_tokens,
        stop=lambda tokens: tokens[-1] in rules.ends,
        adjust=rules.adjust,
        sampling=Sampling(rules.temperature, rules.top_k, rules.top_p, seed, keys),
        listener=listener,
    )
    return [made[start : start + answers] for start in range(0, len(made), answers)]
