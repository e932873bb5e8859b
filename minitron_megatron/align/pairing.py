"""Preference pairs: of several answers to a prompt the best and the worst by reward."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from typing_extensions import TypedDict

from ..data import PromptRecord, read_prompts
from ..errors import DataError
from ..events import Listener, silent
from ..files import read_as, whole_file
from ..model import Model, evaluating
from ..parallel import Topology, broadcast_object, fail_together
from .answering import Answered, answering
from .rewards import Record
from .sampling import AnswerSettings

__all__ = ["PairsSummary", "RatedPair", "make_pairs", "pair_of", "write_pairs"]

Message = Mapping[str, object]


class RatedPair(NamedTuple):
    """The best and the worst response to a prompt."""

    record: Record
    """Record of the prompt."""
    chosen: Message
    rejected: Message
    rewards: tuple[float, float]
    """Rewards of the chosen and the rejected response."""


class PairsSummary(TypedDict):
    """Counts and means of the answers from which pairs were made."""

    prompts: int
    pairs: int
    all_equal: int
    """Prompts whose answers all have the same reward, so that they give no pair."""
    mean_reward: float
    """Mean over all answers."""
    mean_best: float
    """Mean over the prompts of the best answer's reward."""
    ended: float | None
    """Share of the answers that ended by themselves, before `max_tokens`; None if nothing was sampled."""


def pair_of(record: Record, responses: Sequence[Message], rewards: Sequence[float]) -> RatedPair | None:
    """Return the best and the worst of the responses to a prompt; None where no two differ in both text and reward.

    Among equal rewards the response with the lowest number counts. A worst response that equals the best one, which
    some rewards can give, is passed over for the next.
    """
    numbers = range(len(rewards))
    best = max(numbers, key=lambda number: (rewards[number], -number), default=0)
    worse = [number for number in numbers if rewards[number] < rewards[best] and responses[number] != responses[best]]
    if not worse:
        return None
    worst = min(worse, key=lambda number: (rewards[number], number))
    return RatedPair(record, responses[best], responses[worst], (rewards[best], rewards[worst]))


def write_pairs(path: Path, pairs: Iterable[RatedPair]) -> int:
    """Write pairs as JSON lines that `data.preference_pairs` reads, and return their number.

    The file is whole or absent. Raises DataError, and writes nothing, if there is no pair.
    """
    count = 0
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for pair in pairs:
            count += 1
            line = {"prompt": pair.record["prompt"], "chosen": pair.chosen, "rejected": pair.rejected}
            line |= dict(zip(("chosen_reward", "rejected_reward"), pair.rewards, strict=True))
            line |= {"tools": pair.record["tools"]} if "tools" in pair.record else {}
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        if not count:
            raise DataError(
                f"no pair can be made for {path}: the answers to each prompt are equal, or have equal rewards. "
                "Give prompts that the model answers well at times, or sample more answers."
            )
    return count


def make_pairs(
    model: Model | None,
    topology: Topology,
    settings: AnswerSettings,
    tokenizer_folder: Path,
    out_file: Path,
    parts_folder: Path,
    *,
    seed: int,
    run_code: bool = False,
    listener: Listener = silent,
) -> PairsSummary:
    """Sample answers to prompts, rate them, and write a preference pair of each prompt that gives one. Collective.

    model: None where `settings.samples` is false. tokenizer_folder: Hugging Face folder of the tokenizer, its chat
    template and the generation settings. parts_folder: keeps what was sampled of this model, so that the same call goes
    on after a kill, to the same bytes; the caller removes it. run_code: whether a reward may run programs that the
    model wrote. Raises MinitronErrors, before anything is sampled, for a record, reward or setting that does not fit;
    DataError if no prompt gives a pair.
    """
    with fail_together():
        prompts = list(read_prompts(settings.paths, rated=not settings.samples, limit=settings.limit))
    parts = list[Path]()
    if settings.samples:
        assert model is not None
        with evaluating(model):
            how = (model, topology, settings, tokenizer_folder, prompts)
            parts = answering(*how, seed=seed, run_code=run_code, listener=listener).parts(parts_folder)
    summary = None
    with fail_together():
        if topology.rank == 0:
            summary = _write(out_file, prompts, _read(parts) if settings.samples else map(_given, prompts))
    found: PairsSummary = broadcast_object(summary)
    return found


class _Rated(NamedTuple):
    """Responses to one prompt."""

    responses: Sequence[Message]
    rewards: Sequence[float]
    ended: int | None
    """Number of responses that ended by themselves; None if they were not sampled."""


def _read(parts: Sequence[Path]) -> Iterator[_Rated]:
    for part in parts:
        for each in read_as(part, list[Answered]):
            responses = [{"role": "assistant", "content": text} for text in each["responses"]]
            yield _Rated(responses, each["rewards"], each["ended"])


def _given(prompt: PromptRecord) -> _Rated:
    return _Rated(prompt.record["responses"], prompt.record["rewards"], None)


@dataclass
class _Tally:
    """Running counts and sums of the answers to the prompts so far."""

    answers: int = 0
    all_equal: int = 0
    reward: float = 0.0
    best: float = 0.0
    ended: int | None = 0

    def add(self, rated: _Rated) -> None:
        self.answers += len(rated.rewards)
        self.all_equal += len(set(rated.rewards)) == 1
        self.reward += sum(rated.rewards)
        self.best += max(rated.rewards)
        self.ended = None if rated.ended is None or self.ended is None else self.ended + rated.ended


def _write(path: Path, prompts: Sequence[PromptRecord], rated: Iterable[_Rated]) -> PairsSummary:
    """Write the pairs of all prompts, on one rank, and return what they were made from."""
    tally = _Tally()

    def pairs() -> Iterator[RatedPair]:
        for prompt, each in zip(prompts, rated, strict=True):
            tally.add(each)
            if pair := pair_of(prompt.record, each.responses, each.rewards):
                yield pair

    count = write_pairs(path, pairs())
    return PairsSummary(
        prompts=len(prompts),
        pairs=count,
        all_equal=tally.all_equal,
        mean_reward=tally.reward / tally.answers,
        mean_best=tally.best / len(prompts),
        ended=None if tally.ended is None else tally.ended / tally.answers,
    )
