"""Recipe keys of teacher correction and distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from ..distill import StatePairs
from ..losses import KDLoss
from ..settings import (
    AddedLater,
    AfterValidator,
    Count,
    Field,
    FilePath,
    HowToRun,
    NotNegative,
    Positive,
    Settings,
    Steps,
    model_validator,
)
from ..train import OBJECTIVES, TrainingSettings

__all__ = ["Correct", "Distill", "TrainingKeys", "steps_of"]


def steps_of(tokens: int, global_batch: int, sequence: int) -> int:
    """Return the number of steps that cover these tokens."""
    return -(-tokens // (global_batch * sequence))


class TrainingKeys(TrainingSettings):
    """Training settings."""

    tokens: Count = 94_000_000_000
    """Training tokens, rounded up to whole steps."""
    global_batch: Count = 1152
    """Samples per step."""
    micro_batch: HowToRun[Count] = 1
    """Samples per forward pass of one data-parallel rank."""

    def steps(self, sequence: int) -> int:
        """Return the number of steps that cover `tokens` tokens."""
        return steps_of(self.tokens, self.global_batch, sequence)


class Correct(TrainingKeys):
    """Teacher correction: fine-tune the teacher by cross-entropy on the distillation data, before pruning."""

    tokens: Count = 100_000_000_000
    """Training tokens, rounded up to whole steps."""
    lr: Positive = 6e-5
    """Peak learning rate. Recommended: a fifth of the teacher's pretraining peak (the default fits Llama 3.1's
    3e-4)."""
    warmup_steps: Steps = 120
    """Steps of linear warm-up."""
    objective: AddedLater[Annotated[str, AfterValidator(OBJECTIVES.known), Field(examples=[*OBJECTIVES])]] = (
        "cross_entropy"
    )
    """Loss that is minimised: `cross_entropy`, or the name of a plugin's objective."""
    parameters: Literal["all", "norms", "lora"] = "all"
    """Parameters that are trained: `all`; `norms` alone, which takes little more memory than the weights; or `lora`,
    low-rank adapters of the layers' matrices, merged at the end, which take about twice the memory of the weights."""
    lora_rank: Count = 16
    """Rank of the adapters, for `parameters: lora`."""
    continuous: bool = False
    """Correct the teacher during distillation: in each step it takes an optimizer step on the same batch, and the
    student learns from the teacher as it was before that step. The original teacher is pruned; tokens and batch size
    are those of `distill`."""


class Phase(Settings):
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


DISTILLATION = "distillation"


def _distill_objective(name: str) -> str:
    return name if name == DISTILLATION else OBJECTIVES.known(name)


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
    loss: KDLoss = KDLoss()
    states: StatePairs | None = None
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
    objective: AddedLater[
        Annotated[str, AfterValidator(_distill_objective), Field(examples=[DISTILLATION, *OBJECTIVES])]
    ] = DISTILLATION
    """Loss that is minimised: `distillation`, from the teacher; or conventional training without a teacher, for
    comparison: `cross_entropy`, or the name of a plugin's objective."""

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher runs beside the student."""
        return self.objective == DISTILLATION

    @model_validator(mode="after")
    def _needs_a_teacher(self) -> Distill:
        given = [name for name in ("states", "teacher_window", "teacher_dtype") if getattr(self, name)]
        given += ["loss"] * (self.loss != KDLoss()) + ["offload_teacher"] * self.offload_teacher
        if given and not self.has_teacher:
            raise ValueError(f"objective: {self.objective} has no teacher, so {given[0]} cannot apply: remove it")
        return self

    @model_validator(mode="after")
    def _sees_whole_steps(self) -> Distill:
        if self.teacher_window and self.states and self.states.alpha == "dynamic":
            raise ValueError(
                "states.alpha: dynamic needs the teacher's states of a whole step: set alpha to a number, or remove "
                "teacher_window"
            )
        return self
