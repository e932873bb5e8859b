"""Reward models: a Hugging Face model that gives a conversation one logit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import ChatCodec, chat_codec
from ..errors import DataError, ModelError, first_line
from .rewards import Record

__all__ = ["RewardModel", "load_reward_model"]


@dataclass(frozen=True)
class RewardModel:
    """Rates answers by a sequence-classification model and the chat template of its own tokenizer.

    One conversation at a time, so that no padding decides a reward.
    """

    model: Any
    codec: ChatCodec
    positions: int
    """Tokens of a conversation at most."""

    def __call__(self, records: Sequence[Record], responses: Sequence[str]) -> list[float]:
        return [self._reward(record, response) for record, response in zip(records, responses, strict=True)]

    @torch.inference_mode()
    def _reward(self, record: Record, response: str) -> float:
        ids = self.codec.answered(dict(record), response)
        if len(ids) > self.positions:
            raise DataError(
                f"the conversation that ends with {response[-60:]!r} has {len(ids)} tokens for the reward model, which "
                f"reads {self.positions}. Lower `max_tokens`, or leave out long prompts."
            )
        tokens = torch.tensor([ids], device=self.model.device)
        return float(self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, 0])


def load_reward_model(folder: Path, device: torch.device) -> RewardModel:
    """Load a reward model in the dtype that it is stored in, from safetensors alone; no code of the folder runs.

    Raises ModelError if it is no sequence-classification model with one logit, or lacks weights; DataError for a
    tokenizer without a chat template.
    """
    codec = chat_codec(folder)
    from transformers import AutoModelForSequenceClassification

    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True, "dtype": "auto"}
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            os.fspath(folder), output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises anything
        raise ModelError(
            f"the reward model in {folder} cannot be loaded: {first_line(error)}. "
            "Give a Hugging Face folder with a sequence-classification model in safetensors."
        ) from error
    if model.config.num_labels != 1:
        raise ModelError(
            f"the reward model in {folder} has {model.config.num_labels} logits, and a reward is one number. "
            "Give a sequence-classification model with num_labels 1."
        )
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"the reward model in {folder} has no weights for {missing[0]}, which transformers would draw at random. "
            "Give a trained sequence-classification model."
        )
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return RewardModel(model.eval().to(device), codec, int(most) if most else 2**31)
