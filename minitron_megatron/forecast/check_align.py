"""Checks of the rounds of alignment."""

from __future__ import annotations

from ..align import REWARDS, AnswerSettings
from ..data import HUB, chat_marks, read_prompts
from ..parallel import Topology
from ..recipe import Recipe, SftRound
from .check_training import check_micro_batches, check_schedule, check_sequence

__all__ = ["check_rounds"]


def check_rounds(recipe: Recipe, topology: Topology) -> None:
    """Check schedules, batches and lengths, and that the tokenizer has a chat template."""
    for number, keys in enumerate(recipe.align):
        key, sequence = f"align.{number}", keys.sequence or recipe.data.sequence
        tokens = keys.tokens if isinstance(keys, SftRound) else None
        check_schedule(key, keys, -(-tokens // (keys.global_batch * sequence)) if tokens else None)
        check_micro_batches(f"{key}.global_batch", keys.global_batch, keys.micro_batch, topology, topology.replicas)
        if isinstance(keys, SftRound):
            check_sequence(f"{key}.sequence", sequence, topology)
        elif keys.sample:
            _check_sampling(keys.sample, recipe)
    if recipe.align and any(recipe.model.glob("tokenizer*")):
        chat_marks(recipe.model)


def _check_sampling(keys: AnswerSettings, recipe: Recipe) -> None:
    """Check the reward, and the records that are on this machine."""
    here = not any(path.startswith(HUB) for path in keys.paths)
    prompts = list(read_prompts(keys.paths, rated=not keys.samples, limit=keys.limit)) if here else []
    if keys.reward in REWARDS:
        REWARDS[keys.reward].check(keys.reward, prompts, recipe.evaluate.run_code)
