"""The recipe: everything a run is told, as a frozen tree. Unknown keys are errors; the defaults are the papers'."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..distill import StatePairs
from ..errors import RecipeError
from ..layout import PUBLIC_AXES
from ..losses import KDLoss
from ..model import Recompute

__all__ = ["Data", "Depth", "Distill", "Recipe", "Source", "TrainingKeys", "json_schema"]

DType = Literal["float32", "bfloat16"]


def _whole(value: Any) -> Any:
    """YAML reads `94e9` as text and `94.0e9` as a float: both are whole numbers here."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _layers(value: Any) -> Any:
    """A number of layers, or a list of them; said once, where pydantic would tell of each alternative."""
    listed = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(layer, int) for layer in listed) or (isinstance(value, int) and value < 1):
        raise ValueError("Give how many layers to keep, or a list of those that stay")
    return value


Written = Annotated[str, BeforeValidator(str)]
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Layers = Annotated[int | tuple[int, ...], BeforeValidator(_layers)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Parallel(Keys):
    """How the model is spread. Data parallelism is what the processes leave over. No result depends on it."""

    tp: Count = 1
    """Tensor-parallel ranks."""
    pp: Count = 1
    """Pipeline stages."""
    vp: Count = 1
    """Virtual pipeline stages a rank; above 1 the schedule is interleaved."""
    ep: Count = 1
    """Expert-parallel ranks, among all of a pipeline stage. Experts are split over them whole, never by tp."""
    sequence_parallel: bool = False
    """Split the norms' activations over the tensor-parallel ranks."""


class Source(Keys):
    """A part of the blend."""

    path: Path
    """A .jsonl or .txt file, or a folder of them."""
    weight: Positive = 1.0
    """Share of the samples, relative to the other sources."""
    validation: Path | float = 0.01
    """Held-out files, or the share of documents to hold out."""


class Data(Keys):
    """The distillation corpus; teacher correction and calibration draw from it too."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """What is blended, by weight."""
    sequence: Count = 8192
    """Tokens a sample."""
    text_key: str = "text"
    """The field of a .jsonl line that holds the text."""
    repeat: bool = False
    """Read a source again, in another order, where a budget asks for more than it holds; else that is an error."""
    cross_documents: bool = True
    """Let attention reach from a document into those packed before it in a sample, as in Megatron's pretraining; false:
    each document is on its own, and nothing is learnt from what follows its end."""
    separator: str = "<|endoftext|>"
    """Stands between the documents of a .txt file."""
    workers: Count = 1
    """Processes that tokenize."""


class TrainingKeys(Keys):
    """How long and how fast a model is trained."""

    tokens: Count = 94_000_000_000
    """Budget; rounded up to whole steps."""
    global_batch: Count = 1152
    """Samples a step."""
    micro_batch: Count = 1
    """Samples a forward pass of one data-parallel rank."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    min_lr: NotNegative = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    weight_decay: NotNegative = 0.1
    clip: Positive = 1.0
    """Largest global norm of a step's gradient."""
    save_every: Count = 100
    """Steps between checkpoints. Those of validated steps can be the best."""
    keep_checkpoints: Count = 2
    """Checkpoints that stay while the stage is at work, besides the one with the least validation loss."""
    save_async: bool = True
    """Train on while a checkpoint is written."""
    validate_every: Count = 100
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
    warmup_steps: Annotated[int, Field(ge=0)] = 120
    parameters: Literal["all", "norms", "lora"] = "all"
    """What trains: everything; the norms alone, which needs little more memory than the weights; or low-rank
    corrections of the layers' matrices, merged into them afterwards, which need about twice the weights."""
    lora_rank: Count = 16
    """Of the corrections where `parameters` is lora."""
    continuous: bool = False
    """Correct the teacher while it teaches: in each step of distillation it takes one of its own on the same batch, and
    the student learns from what it is then. The original is pruned, and the budget and batch are distillation's."""


class StatisticKeys(Keys):
    """How activations add up to a score."""

    batch: Literal["l2", "mean", "var"] = "l2"
    """Over samples."""
    sequence: Literal["l2", "mean", "var"] = "mean"
    """Over the positions of a sample, first; `mean` is of absolute values."""
    neurons: Literal["post", "pre"] = "post"
    """Neurons are measured after the activation and the gate, or before them, which a gated MLP does not have."""
    heads: Literal["norm_last", "norm_first"] = "norm_last"
    """A head's channels become one number, their L2 norm, once all has added up, or at each position."""


class Depth(Keys):
    """Importance of layers, from what the network is without a block of them."""

    metric: Literal["loss", "kl", "bi"] = "loss"
    """Cross-entropy, or KL to the whole network, in nats per token; or block importance: 1 - the mean cosine of what
    enters a block and what leaves it."""
    lengths: tuple[Count, ...] = ()
    """Lengths of the blocks to measure, besides the one that `prune.layers` needs; none and no need: single layers."""
    greedy: bool = False
    """Also take as many layers one by one as `prune.layers` lets go, each the best to lose after those before it."""


class Score(Keys):
    """Importance from forward passes over calibration samples."""

    samples: Count = 1024
    micro_batch: Count = 1
    statistic: StatisticKeys = StatisticKeys()
    dtype: DType = "float32"
    depth: Depth | None = None
    """Left out: layers are measured only where `prune.layers` is a number."""


class Prune(Keys):
    """The sizes to keep; an axis left out stays whole."""

    hidden: Count | None = None
    """Channels of the residual stream."""
    ffn: Count | None = None
    """Neurons a layer."""
    heads: Count | None = None
    """Query heads in total, as many from each kv_group; heads with keys and values of their own take them along."""
    kv_groups: Count | None = None
    """Keys and values, each with its query heads. The papers keep them all."""
    experts: Count | None = None
    """Experts of each mixture."""
    expert_ffn: Count | None = None
    """Neurons of each expert."""
    shared_ffn: Count | None = None
    """Neurons of the experts that every token goes through."""
    layers: Layers | None = None
    """Which layers to keep, numbered from 0; or how many, chosen by `score.depth`."""
    contiguous: bool = True
    """Where `layers` is a number: what goes is one block; false: the layers taken greedily, or the best single ones."""
    teacher: Literal["corrected", "original"] = "corrected"
    """Which teacher is scored and cut, where the recipe corrects it; the student learns from the corrected one."""
    by: Literal["importance", "random", "first"] = "importance"
    """How units are chosen. `random` (by `seed`) and `first` are what importance has to beat."""
    scope: Literal["layer", "network"] = "layer"
    """Neurons and heads are ranked in each layer; or by their sum over the layers, which then keep the same indices."""
    iterations: Count = 1
    """Score and cut the widths in so many even steps, each on the model that the one before left. Layers go in the
    first. The papers found no gain."""
    merge: Literal["none", "q", "q+o", "qkvo"] = "none"
    """Head-residual merge: heads that stay take along their difference to heads that go, in these projections."""
    merge_sign: Literal["printed", "reversed"] = "printed"
    """head + (head - partner) as the paper prints it, or the opposite difference."""

    def sizes(self) -> dict[str, int]:
        """The width axes that are cut."""
        return {axis: size for axis in PUBLIC_AXES if (size := getattr(self, axis)) is not None}


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
    budget_mib: Count | None = None
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
    micro_batch: Count | None = None
    lr: Positive | None = None
    """Peak learning rate of the phase, which warms up and decays anew."""
    min_lr: NotNegative | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None


class Distill(TrainingKeys):
    """The student learns from the teacher."""

    phases: tuple[Phase, ...] = ()
    """What follows on `tokens`, each from where the one before ended. A phase that is added later continues the run."""
    start: Path | None = None
    """A Hugging Face folder of the student's shape to begin with, instead of what `prune` leaves: such as a checkpoint
    that was exported."""
    retain: bool = False
    """Leave the checkpoints when the stage is done, to add a phase to."""
    loss: LossKeys = LossKeys()
    states: StateKeys | None = None
    """Left out: the student learns from the logits alone, as in both papers' final recipes."""
    teacher_window: Count | None = None
    """Micro-batches of a data-parallel rank that the teacher runs ahead of the student, whose final states are held
    meanwhile. By default all of a step, which costs fewest pipeline bubbles."""
    teacher_dtype: Literal["float32", "bfloat16", "float8"] | None = None
    """What the teacher is held in; left out: the recipe's dtype. float8: its layers' matrices take a byte a weight and
    are widened as each runs, which rounds what they teach."""
    offload_teacher: bool = False
    """Keep the teacher in host memory while the student trains: less device memory, a copy to the device each step."""


class Evaluate(Keys):
    """Loss on held-out text."""

    samples: Count = 256
    """Held-out sequences of each source."""
    micro_batch: Count = 1


class Export(Keys):
    """The Hugging Face folder that is served."""

    dtype: DType = "bfloat16"


class Recipe(Keys):
    """A run from a pretrained checkpoint to a smaller one. Paths are relative to where the command runs."""

    model: Path
    """The Hugging Face folder of the teacher."""
    out: Path
    """The run folder."""
    seed: int = 1
    dtype: DType = "bfloat16"
    """Of the weights in training; the optimizer keeps fp32."""
    recompute: Recompute = "none"
    """What runs again in the backward pass to save memory: `selective` the MLPs, whose activations are the widest;
    `full` whole layers, of which only the input is kept, for a third more time."""
    parallel: Parallel = Parallel()
    data: Data
    correct: Correct | None = None
    """Left out: the teacher is used as it is."""
    score: Score = Score()
    prune: Prune
    distill: Distill = Distill()
    random_baseline: bool = False
    """Also distil into a randomly initialised student of the same shape on the same tokens, for comparison."""
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    @property
    def teacher_runs_in(self) -> DType:
        """The dtype that a frozen teacher computes in."""
        held = self.distill.teacher_dtype
        return self.dtype if held is None or held == "float8" else held

    @property
    def corrects_first(self) -> bool:
        """Whether the teacher is corrected before anything else."""
        return self.correct is not None and not self.correct.continuous

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        distill = self.distill
        if self.correct and self.correct.continuous:
            for key in ("offload_teacher", "teacher_window", "teacher_dtype"):
                if getattr(distill, key):
                    raise ValueError(f"A teacher that is corrected continuously trains: leave distill.{key} out")
        if distill.teacher_window and distill.states and distill.states.alpha == "dynamic":
            raise ValueError(
                "A dynamic distill.states.alpha is measured on a whole step: give it a number, or leave "
                "distill.teacher_window out"
            )
        return self


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, with every key's help."""
    return Recipe.model_json_schema()
