"""Recipe keys of teacher correction and distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..distill import StatePairs
from ..errors import RecipeError
from ..losses import KDLoss
from .keys import Count, FilePath, HowToRun, Keys, NotNegative, Positive, Steps, Written

__all__ = ["Correct", "Distill", "TrainingKeys"]


class TrainingKeys(Keys):
    """Training settings."""

    tokens: Count = 94_000_000_000
    """Training tokens, rounded up to whole steps."""
    global_batch: Count = 1152
    """Samples per step."""
    micro_batch: HowToRun[Count] = 1
    """Samples per forward pass of one data-parallel rank."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    min_lr: NotNegative = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: Steps = 40
    """Steps of linear warm-up."""
    weight_decay: NotNegative = 0.1
    """Weight decay of AdamW."""
    clip: Positive = 1.0
    """Gradient clipping: maximum global norm."""
    save_every: HowToRun[Count] = 100
    """Steps between checkpoints. Only a checkpoint at a validated step can become the best one."""
    keep_checkpoints: HowToRun[Count] = 2
    """Newest checkpoints to keep while the stage runs, in addition to the one with the lowest validation loss."""
    save_async: HowToRun[bool] = True
    """Continue training while a checkpoint is written."""
    validate_every: HowToRun[Count] = 100
    """Steps between validations."""

    def steps(self, sequence: int) -> int:
        """Return the number of steps that cover `tokens` tokens."""
        return -(-self.tokens // (self.global_batch * sequence))


class Correct(TrainingKeys):
    """Teacher correction: fine-tune the teacher by cross-entropy on the distillation data, before pruning."""

    tokens: Count = 100_000_000_000
    """Training tokens, rounded up to whole steps."""
    lr: Positive = 6e-5
    """Peak learning rate. Recommended: a fifth of the teacher's pretraining peak (the default fits Llama 3.1's
    3e-4)."""
    warmup_steps: Steps = 120
    """Steps of linear warm-up."""
    parameters: Literal["all", "norms", "lora"] = "all"
    """Parameters that are trained: `all`; `norms` alone, which takes little more memory than the weights; or `lora`,
    low-rank adapters of the layers' matrices, merged at the end, which take about twice the memory of the weights."""
    lora_rank: Count = 16
    """Rank of the adapters, for `parameters: lora`."""
    continuous: bool = False
    """Correct the teacher during distillation: in each step it takes an optimizer step on the same batch, and the
    student learns from the teacher as it was before that step. The original teacher is pruned; tokens and batch size
    are those of `distill`."""


class LossKeys(Keys):
    """Loss between the teacher's and the student's logits. The defaults are the papers' best."""

    divergence: str = "forward_kl"
    """Divergence between teacher and student: forward_kl, reverse_kl, jsd, mse or cosine."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Weight of the teacher in the mixture of jsd, by default 0.5. Only for jsd."""
    temperature: Positive = 1.0
    """Softmax temperature: divides both models' logits. It has no effect on cosine."""
    top_k: Count | None = None
    """Use only the teacher's top-k vocabulary entries of each token; both softmaxes are renormalised over them."""
    ce_weight: NotNegative = 0.0
    """Weight of the next-token cross-entropy; the divergence has weight 1."""
    budget_mib: HowToRun[Count | None] = None
    """Memory for chunks of logits, in MiB; more memory means larger chunks. Default: an eighth of the full logits, at
    most 512 MiB."""

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
    """Distillation of hidden states. Layers are written as `"teacher:student"`, in quotes, each numbered from 0 in its
    own model. If the hidden sizes differ, a trained linear map projects the student's states to the teacher's size.
    """

    embedding: bool = False
    """Match the embedding, after the first norm."""
    outputs: tuple[Written, ...] = ()
    """Match layer outputs, after the norm that follows. The papers, for a student with far fewer layers: the third to
    last layer of each model, together with the embedding."""
    mlp_inputs: tuple[Written, ...] = ()
    """Match MLP inputs, after the norm before the MLP. The papers found no gain."""
    attention: tuple[Written, ...] = ()
    """Match attention relations, as in MiniLMv2: query-query, key-key and value-value similarities between tokens. The
    papers found no gain."""
    loss: str = "cosine"
    """Loss between states: cosine or mse. Not used for `attention`."""
    alpha: Positive | Literal["dynamic"] = "dynamic"
    """Weight of the loss on states. `dynamic` updates it in each step so that the loss on states is as large as the
    loss on logits."""

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
    """A further phase of distillation. An omitted key has the value of the phase before."""

    tokens: Count
    """Training tokens of the phase, rounded up to whole steps."""
    sequence: Count | None = None
    """Tokens per sample."""
    weights: tuple[Positive, ...] | None = None
    """Blend weights, one for each of `data.sources`."""
    global_batch: Count | None = None
    """Samples per step."""
    micro_batch: HowToRun[Count | None] = None
    """Samples per forward pass of one data-parallel rank."""
    lr: Positive | None = None
    """Peak learning rate. Each phase has its own warm-up and decay."""
    min_lr: NotNegative | None = None
    """Learning rate at the end of the cosine."""
    warmup_steps: Steps | None = None
    """Steps of linear warm-up."""


class Distill(TrainingKeys):
    """Distillation of the teacher into the pruned student."""

    phases: tuple[Phase, ...] = ()
    """Further training phases, in order. Each continues from the end of the phase before. A phase added later continues
    a finished run."""
    start: FilePath | None = None
    """Hugging Face folder of the student's shape to start from, instead of the pruned model: for example an exported
    checkpoint."""
    retain: HowToRun[bool] = False
    """Keep the training checkpoints when the stage is done, so that a phase can be added later."""
    loss: LossKeys = LossKeys()
    states: StateKeys | None = None
    """Distillation of hidden states. If omitted, the student learns from the logits alone, as in both papers' final
    recipes."""
    teacher_window: HowToRun[Count | None] = None
    """Micro-batches that the teacher runs ahead of the student; its final hidden states of these are held in memory.
    Default: all micro-batches of a step, which gives the fewest pipeline bubbles."""
    teacher_dtype: Literal["float32", "bfloat16", "float8"] | None = None
    """Dtype of the teacher's weights. Default: the recipe's dtype. float8 stores the matrices of its layers in one byte
    per weight and widens them as each layer runs; the rounding changes the teacher slightly."""
    offload_teacher: HowToRun[bool] = False
    """Keep the teacher in host memory while the student trains: saves device memory, and copies the teacher to the
    device in each step."""
