"""The recipe: everything a run is told, as a frozen tree. Unknown keys are errors; the defaults are the papers'."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..evaluate import PROGRAMS, SUITES, Task
from ..layout import PUBLIC_AXES
from ..model import Recompute, Spec
from ..serve import LADDER
from .keys import Count, DType, FilePath, HeldOut, HowToRun, Keys, Layers, Positive, Seed, Steps, Text
from .search_keys import Search
from .training_keys import Correct, Distill

__all__ = ["Data", "Depth", "Recipe", "Source", "json_schema"]


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
    cp: Count = 1
    """Context-parallel ranks, among the data-parallel ones: so many share each sequence in training, for long ones."""


class Source(Keys):
    """A part of the blend."""

    path: FilePath
    """A .jsonl or .txt file, or a folder of them."""
    weight: Positive = 1.0
    """Share of the samples, relative to the other sources."""
    validation: HeldOut = 0.01
    """Held-out files, or the share of documents to hold out."""


class Data(Keys):
    """The distillation corpus; teacher correction and calibration draw from it too."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """What is blended, by weight."""
    sequence: Count = 8192
    """Tokens a sample."""
    text_key: Text = "text"
    """The field of a .jsonl line that holds the text."""
    repeat: HowToRun[bool] = False
    """Read a source again, in another order, where a budget asks for more than it holds; else that is an error."""
    cross_documents: bool = True
    """Let attention reach from a document into those packed before it in a sample, as in Megatron's pretraining; false:
    each document is on its own, and nothing is learnt from what follows its end."""
    beyond_positions: bool = False
    """Let samples be longer than the model's `max_position_embeddings`, beyond which it was never trained, or its
    sliding window; else that is an error."""
    separator: Text = "<|endoftext|>"
    """Stands between the documents of a .txt file."""
    workers: HowToRun[Annotated[Count, Field(le=1024)]] = 1
    """Processes that tokenize."""


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

    metric: Literal["loss", "kl", "bi", "winogrande"] = "loss"
    """Cross-entropy, or KL to the whole network, in nats per token; block importance: 1 - the mean cosine of what
    enters a block and what leaves it; or the accuracy at Winogrande with five shots (`evaluate.task_files`, `limit`),
    by which the second paper chose."""
    lengths: tuple[Count, ...] = ()
    """Lengths of the blocks to measure, besides the one that `prune.layers` needs; none and no need: single layers."""
    greedy: bool = False
    """Also take as many layers one by one as `prune.layers` lets go, each the best to lose after those before it."""


class Score(Keys):
    """Importance from forward passes over calibration samples."""

    samples: Count = 1024
    micro_batch: HowToRun[Count] = 1
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
    iterations: Annotated[Count, Field(le=1000)] = 1
    """Score and cut the widths in so many even steps, each on the model that the one before left. Layers go in the
    first. The papers found no gain."""
    merge: Literal["none", "q", "q+o", "qkvo"] = "none"
    """Head-residual merge: heads that stay take along their difference to heads that go, in these projections."""
    merge_sign: Literal["printed", "reversed"] = "printed"
    """head + (head - partner) as the paper prints it, or the opposite difference."""
    refit: Literal["none", "outputs", "sequential"] = "none"
    """Repair the linear layers of the cut model by least squares on calibration samples, before distillation: each
    layer on the teacher's states (`outputs`), or on the student's own states so far, aiming at the teacher's
    (`sequential`), which makes up for dropped layers too."""
    refit_samples: Count = 1024
    """Calibration samples of the refit; an eighth of them is held out and chooses the ridge strength."""
    refit_ridge: Positive | None = None
    """Ridge strength towards the trimmed weights, relative to the mean square of a layer's inputs; left out: each layer
    takes the one with the least error on the held-out samples."""

    def sizes(self) -> dict[str, int]:
        """The width axes that are cut."""
        return {axis: size for axis in PUBLIC_AXES if (size := getattr(self, axis)) is not None}


class TaskKeys(Keys):
    """A task of lm-evaluation-harness."""

    name: Text
    """As the harness calls it; a group or a tag is all of its tasks."""
    shots: Steps | None = None
    """Solved examples before each question; left out: as the task has it."""
    metric: str | None = None
    """The one that stands in tables; left out: the task's first."""
    answers: Count = 1
    """Sampled for each question that is answered by generation."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """Of sampling, 0 the likeliest; left out: as the task has it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sampled from the likeliest tokens of so much of the probability."""


class Evaluate(Keys):
    """Loss on held-out text, and tasks of lm-evaluation-harness."""

    samples: Count = 256
    """Held-out sequences of each source."""
    micro_batch: HowToRun[Count] = 1
    suite: Literal["base", "instruct"] | None = None
    """The papers' tasks with their shots, metrics and sampling; HumanEval and MBPP only with `run_code`."""
    tasks: tuple[TaskKeys, ...] = ()
    """More of them."""
    task_files: FilePath | None = None
    """A folder with `<task>/<split>.jsonl`, in the fields that the task reads; left out: they are downloaded."""
    limit: Count | None = None
    """Questions of each task."""
    truncate: bool = False
    """Drop the beginning of a prompt that is longer than the model's context; else that is an error."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template, as a model that was tuned to instructions wants them."""
    run_code: bool = False
    """Run the programs that models write for HumanEval and MBPP, on the first rank's machine, as isolated as it allows:
    namespaces of bubblewrap or unshare where they are there, else limits alone, and then only in a container."""

    def wanted(self) -> list[Task]:
        """Of the suite and besides."""
        suite = [each for each in SUITES.get(self.suite or "", ()) if self.run_code or each.name not in PROGRAMS]
        return [*suite, *(Task(**task.model_dump()) for task in self.tasks)]


class Export(Keys):
    """The Hugging Face folder that is served."""

    dtype: DType = "bfloat16"
    architecture: Literal["auto", "own"] = "auto"
    """`auto` writes a Qwen2 whose hidden size is not heads x head_dim as a Llama with `attention_bias`, which computes
    the same and which more clients read; `own` writes the teacher's family."""
    quantize: Literal["none", "fp8"] = "none"
    """Also write `export-fp8`: ModelOpt's post-training quantisation, e4m3 with a scale for each matrix and its input,
    found on calibration samples in one process."""
    quantize_samples: Count = 128
    """Of the calibration samples, at most `score.samples`."""
    kv_cache_fp8: bool = False
    """Keys and values in FP8 too."""


class Bench(Keys):
    """How fast teacher and student serve: `minitron bench`."""

    ladder: tuple[tuple[Count, Count], ...] = LADDER
    """[input, output] tokens of the requests of each rung."""
    batches: Annotated[tuple[Count, ...], Field(min_length=1)] = (32, 64)
    """Requests at a time; the papers' two."""
    requests: Count = 256
    """Of each rung, for trtllm-bench."""
    tp: Count = 1
    """GPUs that serve one model."""


class Log(Keys):
    """Where measurements go besides `metrics.jsonl`, which always has them all."""

    wandb: Literal["online", "offline"] | None = None
    """To a server, or into `RUN/wandb` for `wandb sync`; a run that is killed and goes on is one run there."""
    project: str = "minitron"
    """wandb's."""
    tensorboard: bool = False
    """Event files in `RUN/tensorboard`."""


class Recipe(Keys):
    """A run from a pretrained checkpoint to a smaller one. Paths are relative to where the command runs."""

    model: FilePath
    """The Hugging Face folder of the teacher."""
    out: HowToRun[FilePath]
    """The run folder."""
    seed: Seed = 1
    dtype: DType = "bfloat16"
    """Of the weights in training; the optimizer keeps fp32."""
    recompute: HowToRun[Recompute] = "none"
    """What runs again in the backward pass to save memory: `selective` the MLPs, whose activations are the widest;
    `full` whole layers, of which only the input is kept, for a third more time."""
    spec: HowToRun[Spec] = "local"
    """Whose layers compute: Megatron's with our norm, or Transformer Engine's (`te`; it needs CUDA), which compute the
    same with the norms inside their linear layers."""
    parallel: HowToRun[Parallel] = Parallel()
    data: Data
    correct: Correct | None = None
    """Left out: the teacher is used as it is."""
    score: Score = Score()
    search: Search | None = None
    """Have the shape found within a budget; then `prune` names no sizes."""
    prune: Prune = Prune()
    distill: Distill = Distill()
    random_baseline: bool = False
    """Also distil into a randomly initialised student of the same shape on the same tokens, for comparison."""
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    bench: HowToRun[Bench] = Bench()
    log: HowToRun[Log] = Log()
    hang_seconds: HowToRun[Annotated[float, Field(ge=1)]] = 1800.0
    """Where no rank made progress for so long, each writes its stacks to `RUN/stacks` and ends with exit code 76, to be
    started again."""

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
        if self.search is None and "prune" not in self.model_fields_set:
            raise ValueError("prune is missing: it names the sizes to keep, or `search` finds them")
        if self.search and (self.prune.sizes() or self.prune.layers is not None):
            raise ValueError("The sizes are found by `search`: leave them out of `prune`, or `search`")
        if self.search and (self.prune.by != "importance" or self.prune.iterations > 1 or self.prune.merge != "none"):
            raise ValueError(
                "A search cuts by importance, at once, without merging: leave out prune.by, iterations, merge"
            )
        if self.prune.merge != "none" and self.prune.refit != "none":
            raise ValueError("A refit aims at the unmerged heads and would undo prune.merge: set one to none")
        states = distill.states
        if self.spec == "te" and states and (states.embedding or states.outputs or states.mlp_inputs):
            raise ValueError("Layers of spec te show no normed states: set spec to local, or map attention alone")
        if self.correct and self.correct.continuous:
            for key in ("offload_teacher", "teacher_window", "teacher_dtype"):
                if getattr(distill, key):
                    raise ValueError(f"A teacher that is corrected continuously trains: leave distill.{key} out")
        if distill.teacher_window and states and states.alpha == "dynamic":
            raise ValueError(
                "A dynamic distill.states.alpha is measured on a whole step: give it a number, or leave "
                "distill.teacher_window out"
            )
        return self


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, with every key's help."""
    return Recipe.model_json_schema()
