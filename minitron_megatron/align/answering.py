"""Answers of a model to many prompts with their rewards, kept window by window, so that a killed sampling goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import TypedDict

from ..data import ChatCodec, PromptRecord, chat_codec
from ..errors import MinitronError, RecipeError, first_line
from ..evaluate import Decoding, Predictor
from ..events import Event, Listener
from ..files import file_marks, write_json
from ..model import Model
from ..parallel import Topology, broadcast_object, fail_together, gather_objects, place_in_world
from .reward_model import load_reward_model
from .rewards import REWARDS, Rate, Record
from .sampling import MODEL, AnswerSettings, decoding_rules, prompt_ids, sample_answers

__all__ = ["Answered", "Answering", "answering"]

WINDOW = 1024
"""Answers that are sampled and rated before they are kept. The layout does not decide it, so that another one goes
on."""
RATED_AT_A_TIME = 64


class Answered(TypedDict):
    """Answers to one prompt."""

    responses: list[str]
    rewards: list[float]
    ended: int
    """Number of answers that ended by themselves."""


@dataclass(frozen=True)
class Answering:
    """Sampling and rating of answers. Its methods are collective over the world."""

    predictor: Predictor
    settings: AnswerSettings
    codec: ChatCodec
    rules: Decoding
    rate: Rate
    prompts: Sequence[PromptRecord]
    ids: Sequence[Sequence[int]]
    """Token ids of each prompt."""
    seed: int
    listener: Listener

    def parts(self, folder: Path) -> list[Path]:
        """Return JSON files of `Answered`, in the order of the prompts, after making those that are not there yet.

        They lie in a subfolder whose name is a digest of all but the model that decides them.
        """
        each = max(1, WINDOW // self.settings.answers)
        starts = range(0, len(self.prompts), each)
        windows = [range(start, min(start + each, len(self.prompts))) for start in starts]
        files = [folder / self._mark()[:16] / f"{window.start:08d}.json" for window in windows]
        kept = broadcast_object([file.is_file() for file in files])
        for window, file, there in zip(windows, files, kept, strict=True):
            if not there:
                self._keep(self._answered(window), file)
            self.listener(Event("sample", window.stop, len(self.prompts), "prompts"))
        return files

    def _keep(self, answered: Sequence[Answered], file: Path) -> None:
        with fail_together():
            if self.predictor.topology.rank == 0:
                write_json(file, answered)

    def _mark(self) -> str:
        others = repr(replace(self.rules, ends=frozenset()))
        reward_model = file_marks([self.settings.reward_model] if self.settings.reward_model else [])
        digest = hashlib.sha256()
        rows = ([prompt.record, ids] for prompt, ids in zip(self.prompts, self.ids, strict=True))
        for row in ([self.settings.deciding(), self.seed, sorted(self.rules.ends), others, reward_model], *rows):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def _answered(self, window: range) -> list[Answered]:
        """Return the answers to a window of prompts, and their rewards, on every rank."""
        each = self.settings.answers
        made = sample_answers(
            self.predictor,
            [self.ids[number] for number in window],
            self.rules,
            answers=each,
            max_tokens=self.settings.max_tokens,
            seed=self.seed,
            first=window.start,
            listener=self.listener,
        )
        texts = [[self._text(tokens) for tokens in answers] for answers in made]
        records = [self.prompts[number].record for number in window for _ in range(each)]
        rewards = self._rewards(records, [text for answers in texts for text in answers])
        return [
            Answered(
                responses=responses,
                rewards=rewards[at * each : (at + 1) * each],
                ended=sum(tokens[-1] in self.rules.ends for tokens in made[at]),
            )
            for at, responses in enumerate(texts)
        ]

    def _text(self, tokens: Sequence[int]) -> str:
        return self.codec.text(tokens[:-1] if tokens[-1] in self.rules.ends else tokens)

    def _rewards(self, records: Sequence[Record], responses: Sequence[str]) -> list[float]:
        """Return the reward of each answer. Every rank rates a share by a reward model; others run on the first."""
        rank, world = place_in_world()
        shared = self.settings.reward == MODEL
        mine = range(rank, len(responses), world) if shared else range(len(responses) if rank == 0 else 0)
        local: dict[int, float] = {}
        with fail_together():
            for start in range(0, len(mine), RATED_AT_A_TIME):
                part = mine[start : start + RATED_AT_A_TIME]
                found = self._rated([records[at] for at in part], [responses[at] for at in part])
                local |= dict(zip(part, found, strict=True))
                self.listener(Event("reward", start + len(part), len(mine), "answers"))
        every = {at: reward for rated in gather_objects(local) for at, reward in rated.items()}
        return [every[at] for at in range(len(responses))]

    def _rated(self, records: Sequence[Record], responses: Sequence[str]) -> list[float]:
        """Return rewards, on this rank alone. Raises RecipeError where the reward fails, or gives what is no reward."""
        name = self.settings.reward
        try:
            found = [float(reward) for reward in self.rate(records, responses)]
        except MinitronError:
            raise
        except Exception as error:  # a plugin raises anything
            raise RecipeError(
                f"the reward {name} fails: {type(error).__name__}: {first_line(error)}. Correct it."
            ) from error
        if len(found) != len(responses):
            raise RecipeError(f"the reward {name} gave {len(found)} numbers for {len(responses)} answers. Correct it.")
        if wrong := [reward for reward in found if not math.isfinite(reward)]:
            raise RecipeError(f"the reward {name} gave {wrong[0]}, which ranks nothing. Correct it.")
        return found


def answering(
    model: Model,
    topology: Topology,
    settings: AnswerSettings,
    folder: Path,
    prompts: Sequence[PromptRecord],
    *,
    seed: int,
    run_code: bool,
    listener: Listener,
) -> Answering:
    """Return the sampling of answers to `prompts`, with everything checked that can be before it begins. Collective.

    model: in eval mode. folder: tokenizer, chat template and generation settings. Raises MinitronErrors.
    """
    predictor = Predictor(model, topology, micro_batch=settings.micro_batch)
    with fail_together():
        rate = _rate(settings, prompts, topology, run_code)
        codec = chat_codec(folder)
        room = {"vocab": predictor.vocab, "context": predictor.positions, "max_tokens": settings.max_tokens}
        ids = prompt_ids(prompts, codec, **room)
        rules = decoding_rules(folder, settings, codec.ends())
    return Answering(predictor, settings, codec, rules, rate, prompts, ids, seed, listener)


def _rate(settings: AnswerSettings, prompts: Sequence[PromptRecord], topology: Topology, run_code: bool) -> Rate:
    """Return the function that rates answers, after checking that it can rate these."""
    if settings.reward == MODEL:
        assert settings.reward_model is not None
        return load_reward_model(settings.reward_model, topology.device)
    reward = REWARDS[settings.reward]
    reward.check(settings.reward, prompts, run_code)
    return reward.rate
