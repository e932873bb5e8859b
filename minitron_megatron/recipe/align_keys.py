"""Recipe keys of alignment: rounds of supervised fine-tuning and of preference optimisation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Tag

from ..align import AnswerSettings, PairLoss
from ..data import HELD_OUT_SHARE, Sources
from ..losses import KDLoss
from ..settings import Count, Field, HowToRun, NotNegative, Positive, Steps, model_validator
from ..train import TrainingSettings
from .data_keys import Source
from .keys import HeldOut

__all__ = ["AlignRound", "PairRound", "SftRound"]

TOP_K = 100
"""Entries of the teacher's logits that a fine-tuning is distilled from, as in NVIDIA's later recipes."""
BY_METHOD = {"dpo": ("dpo", "ipo"), "rpo": ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")}
"""Losses of each method; a plugin's may be used with either, and sees rewards with `rpo`."""


class RoundKeys(TrainingSettings):
    """Settings of every round."""

    epochs: Positive = 1.0
    """Times that the data is read."""
    sequence: Count | None = None
    """Tokens per sample. Default: `data.sequence`."""
    micro_batch: HowToRun[Count] = 1
    """Samples per forward pass of one data-parallel rank."""


class SftRound(RoundKeys):
    """Supervised fine-tuning on chats: conversations are packed, and attention stays within each."""

    method: Literal["sft"] = "sft"
    """`sft`."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = Field(kw_only=True)
    """Chats to blend by weight, as in `data.sources`; the format is `chat` if it is not given."""
    tokens: Count | None = None
    """Training tokens, rounded up to whole steps, in place of `epochs`. Chats that hold fewer are read again in another
    order."""
    global_batch: Count = 128
    """Samples per step."""
    loss: Literal["ce", "kd", "mix"] = "ce"
    """`ce`, cross-entropy; `kd`, divergence from the teacher's 100 likeliest tokens, which are its logits on the same
    text; `mix`, the sum of both. All on the tokens of the assistant."""
    lr: Positive = 5e-6
    """Peak learning rate."""
    min_lr: NotNegative = 5e-7
    """Learning rate at the end of the cosine."""
    warmup_steps: Steps = 10
    """Steps of linear warm-up."""

    @model_validator(mode="before")
    @classmethod
    def _sources_are_chats(cls, keys: Any) -> Any:
        """Set the format of sources that do not give theirs."""
        sources = keys.get("sources") if isinstance(keys, dict) else None
        if not isinstance(sources, list | tuple):
            return keys
        return keys | {"sources": [{"format": "chat"} | each if isinstance(each, dict) else each for each in sources]}

    unit: ClassVar[str] = "tokens"

    @property
    def paths(self) -> tuple[str, ...]:
        """All places of the chats."""
        return tuple(path for source in self.sources for path in source.paths)

    @property
    def held_out_paths(self) -> tuple[str, ...]:
        """Places of held-out chats."""
        return tuple(path for source in self.sources for path in source.held_out_paths)

    @property
    def kd(self) -> KDLoss:
        """Loss from the teacher's logits, for `kd` and `mix`."""
        return KDLoss(top_k=TOP_K, ce_weight=float(self.loss == "mix"))


class PairRound(PairLoss, RoundKeys):
    """Preference optimisation on pairs of a chosen and a rejected response. The reference is the model that the round
    starts from; the likelihoods of all responses under it are measured once."""

    method: Literal["dpo", "rpo"] = Field(kw_only=True)
    """`dpo`; or `rpo`, which takes the rewards of both responses into account, by default with the loss
    `rpo_bwd_kl`."""
    pairs: Sources | None = None
    """File, folder, glob, or a list of them: records of `prompt`, `chosen` and `rejected`, and for `rpo` also
    `chosen_reward` and `rejected_reward`."""
    sample: AnswerSettings | None = None
    """In place of `pairs`: the model that the round starts from answers prompts, and a reward chooses the pairs."""
    validation: HeldOut = HELD_OUT_SHARE
    """Path of held-out pairs, or the share of the pairs to hold out (between 0 and 1)."""
    global_batch: Count = 64
    """Pairs per step."""
    lr: Positive = 9e-7
    """Peak learning rate."""
    min_lr: NotNegative = 9e-8
    """Learning rate at the end of the cosine."""
    warmup_steps: Steps = 10
    """Steps of linear warm-up."""

    unit: ClassVar[str] = "pairs"

    @model_validator(mode="before")
    @classmethod
    def _rpo_has_its_loss(cls, keys: Any) -> Any:
        """Set the default of `loss` by the method."""
        rpo = isinstance(keys, dict) and keys.get("method") == "rpo"
        return {"loss": BY_METHOD["rpo"][0]} | keys if rpo else keys

    @model_validator(mode="after")
    def _pairs_come_from_one_place(self) -> Self:
        if (self.pairs is None) == (self.sample is None):
            raise ValueError("Give `pairs`, or `sample` to make them, and not both")
        return self

    @model_validator(mode="after")
    def _loss_fits_the_method(self) -> Self:
        other = next((name for name, losses in BY_METHOD.items() if self.loss in losses), self.method)
        if other != self.method:
            raise ValueError(f"The loss {self.loss} belongs to the method {other}: set method to {other}")
        return self

    @property
    def pair_loss(self) -> PairLoss:
        return PairLoss(**{name: getattr(self, name) for name in PairLoss.model_fields})

    @property
    def paths(self) -> tuple[str, ...]:
        """All places of the pairs, or of the prompts that they are made from."""
        if self.pairs is None:
            return self.sample.paths if self.sample else ()
        return (self.pairs,) if isinstance(self.pairs, str) else self.pairs

    @property
    def held_out_paths(self) -> tuple[str, ...]:
        """Places of held-out pairs, if a share of the pairs is not held out instead."""
        return (self.validation,) if isinstance(self.validation, str) else ()


def _kind(keys: object) -> str | None:
    method = keys.get("method") if isinstance(keys, dict) else getattr(keys, "method", None)
    return {"sft": "(SftRound)", "dpo": "(PairRound)", "rpo": "(PairRound)"}.get(str(method))


AlignRound = Annotated[
    Annotated[SftRound, Tag("(SftRound)")] | Annotated[PairRound, Tag("(PairRound)")],
    Discriminator(_kind, custom_error_type="method", custom_error_message="Give a method: sft, dpo or rpo"),
]
"""One round. The tags are in brackets, which leaves them out of messages (`settings.explain`)."""
