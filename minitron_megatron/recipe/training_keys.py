"""The recipe's keys for what trains: teacher correction and distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..distill import StatePairs
from ..errors import RecipeError
from ..losses import KDLoss
from .keys import Count, FilePath, HowToRun, Keys, NotNegative, Positive, Steps, Written

__all__ = ["Correct", "Distill", "TrainingKeys"]


class TrainingKeys(Keys):
    """How long and how fast a model is trained."""

    tokens: Count = 94_000_000_000
    """Budget; rounded up to whole steps."""
    global_batch: Count = 1152
    """Samples a step."""
    micro_batch: HowToRun[Count] = 1
    """Samples a forward pass of one data-parallel rank."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    min_lr: NotNegative = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: Steps = 40
    weight_decay: NotNegative = 0.1
    clip: Positive = 1.0
    """Largest global norm of a step's gradient."""
    save_every: HowToRun[Count] = 100
    """Steps between checkpoints. Those of validated steps can be the best."""
    keep_checkpoints: HowToRun[Count] = 2
    """Checkpoints that stay while the stage is at work, besides the one with the least validation loss."""
    save_async: HowToRun[bool] = True
    """Train on while a checkpoint is written."""
    validate_every: HowToRun[Count] = 100
    """Steps between validations."""

    def steps(self, sequence: int) -> int:
        """Steps that see `tokens` tokens."""
        return -(-self.tokens // (self.global_batch * sequence))


class Correct(TrainingKeys):
    """Teacher correction: cross-entropy on the distillation data before anything is pruned."""

    tokens: Count = 100_000_000_000
    """Budget; rounded up to whole steps."""
    lr: Positive = 6e-5
    """Peak learning rate: a fifth of the one the teacher was pretrained with (here Llama 3.1's 3e-4)."""
    warmup_steps: Steps = 120
    parameters: Literal["all", "norms", "lora"] = "all"
    """What trains: everything; the norms alone, which needs little more memory than the weights; or low-rank
    corrections of the layers' matrices, merged into them afterwards, which need about twice the weights."""
    lora_rank: Count = 16
    """Of the corrections where `parameters` is lora."""
    continuous: bool = False
    """Correct the teacher while it teaches: in each step of distillation it takes one of its own on the same batch, and
    the student learns from what it is then. The original is pruned, and the budget and batch are distillation's."""


class LossKeys(Keys):
    """What the student learns from the teacher's logits. The defaults are what the papers found best."""

    divergence: str = "forward_kl"
    """How far the student is from the teacher: forward_kl, reverse_kl, jsd, mse or cosine."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The teacher's share of jsd's mixture of the two, by default a half. The others have none."""
    temperature: Positive = 1.0
    """Divides both models' logits. No cosine changes with it."""
    top_k: Count | None = None
    """Compare only the teacher's likeliest entries of each token, both softmaxes over these alone."""
    ce_weight: NotNegative = 0.0
    """Weight of cross-entropy with the next token, beside the divergence's 1."""
    budget_mib: HowToRun[Count | None] = None
    """Memory for logits in MiB: the more, the larger the chunks. By default an eighth of all logits, at most 512."""

    @model_validator(mode="after")
    def _can_be(self) -> LossKeys:
        try:
            self.loss()
        except RecipeError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    def loss(self) -> KDLoss:
        return KDLoss(
            self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            top_k=self.top_k,
            ce_weight=self.ce_weight,
            budget_bytes=None if self.budget_mib is None else self.budget_mib * 2**20,
        )


class StateKeys(Keys):
    """What the student learns from the teacher's hidden states: layers as `teacher:student` in quotes, each numbered
    from 0 in its own model. Where the widths differ, one map that trains along raises the student's to the teacher's.
    """

    embedding: bool = False
    """The embedding, after the first norm."""
    outputs: tuple[Written, ...] = ()
    """Outputs of layers, after the norm that follows. The papers: where many layers go, the last but two of each model,
    beside the embedding."""
    mlp_inputs: tuple[Written, ...] = ()
    """What enters MLPs, after the norm before them. The papers found no gain."""
    attention: tuple[Written, ...] = ()
    """How queries, keys and values of each token relate to those before it. The papers found no gain."""
    loss: str = "cosine"
    """How far states are apart, but for `attention`: cosine or mse."""
    alpha: Positive | Literal["dynamic"] = "dynamic"
    """Weight of the states' loss; dynamic: what makes it as large as the logits', found anew each step."""

    @model_validator(mode="after")
    def _can_be(self) -> StateKeys:
        try:
            self.pairs()
        except RecipeError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    def pairs(self) -> StatePairs:
        return StatePairs(**{key: getattr(self, key) for key in type(self).model_fields})


class Phase(Keys):
    """What a further phase of distillation changes; a key left out is as in the phase before."""

    tokens: Count
    """Budget; rounded up to whole steps."""
    sequence: Count | None = None
    """Tokens a sample."""
    weights: tuple[Positive, ...] | None = None
    """The blend: one weight for each of `data.sources`."""
    global_batch: Count | None = None
    micro_batch: HowToRun[Count | None] = None
    lr: Positive | None = None
    """Peak learning rate of the phase, which warms up and decays anew."""
    min_lr: NotNegative | None = None
    warmup_steps: Steps | None = None


class Distill(TrainingKeys):
    """The student learns from the teacher."""

    phases: tuple[Phase, ...] = ()
    """What follows on `tokens`, each from where the one before ended. A phase that is added later continues the run."""
    start: FilePath | None = None
    """A Hugging Face folder of the student's shape to begin with, instead of what `prune` leaves: such as a checkpoint
    that was exported."""
    retain: HowToRun[bool] = False
    """Leave the checkpoints when the stage is done, to add a phase to."""
    loss: LossKeys = LossKeys()
    states: StateKeys | None = None
    """Left out: the student learns from the logits alone, as in both papers' final recipes."""
    teacher_window: HowToRun[Count | None] = None
    """Micro-batches of a data-parallel rank that the teacher runs ahead of the student, whose final states are held
    meanwhile. By default all of a step, which costs fewest pipeline bubbles."""
    teacher_dtype: Literal["float32", "bfloat16", "float8"] | None = None
    """What the teacher is held in; left out: the recipe's dtype. float8: its layers' matrices take a byte a weight and
    are widened as each runs, which rounds what they teach."""
    offload_teacher: HowToRun[bool] = False
    """Keep the teacher in host memory while the student trains: less device memory, a copy to the device each step."""
