"""The recipe: all settings of a run, as a frozen tree. Unknown keys are errors; the defaults are the papers' values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from ..convert import Architecture
from ..evaluate import CHAT_TASKS, PROGRAMS, SUITES, Judge, Task
from ..layout import PUBLIC_AXES
from ..model import Recompute, Spec
from ..parallel import Parallel
from ..prune import Merge, Scope, Sign
from ..records import Statistic
from ..refit import Method
from ..score import DEPTH_METRICS
from ..serve import LADDER
from ..settings import (
    AddedLater,
    AfterValidator,
    Count,
    Field,
    FilePath,
    HowToRun,
    Positive,
    Seed,
    Settings,
    Text,
    model_validator,
)
from .align_keys import AlignRound
from .data_keys import CalibrationSource, Data
from .family_keys import FamilyStudent, check_family_keys
from .keys import DType, Layers
from .search_keys import Search
from .training_keys import Correct, Distill

__all__ = ["Depth", "Recipe", "json_schema"]


class Depth(Settings):
    """Importance of layers, measured by leaving out blocks of consecutive layers."""

    metric: Annotated[str, AfterValidator(DEPTH_METRICS.known), Field(examples=[*DEPTH_METRICS])] = "loss"
    """Measure of a network without the block: `loss`, its cross-entropy, or `kl`, its KL divergence from the full
    network, both in nats per token; `bi`, block importance: 1 - mean cosine similarity of the block's input and output;
    `winogrande`, its 5-shot Winogrande accuracy (as in the second paper; uses `evaluate.task_files` and `limit`)."""
    lengths: tuple[Count, ...] = ()
    """Block lengths to measure, in addition to the one that `prune.layers` needs. If there are none: single layers."""
    greedy: bool = False
    """Also remove layers one by one, each time the layer whose removal hurts least, as many as `prune.layers`
    removes."""


class Score(Settings):
    """Importance scores from forward passes over calibration samples."""

    samples: Count = 1024
    """Number of calibration samples."""
    micro_batch: HowToRun[Count] = 1
    """Samples per forward pass of one data-parallel rank."""
    statistic: Statistic = Statistic()
    dtype: DType = "float32"
    """Dtype of the forward passes."""
    depth: Depth | None = None
    """Importance of layers. If omitted, layers are measured only when `prune.layers` is a number or `search.layers` is
    set."""
    sources: AddedLater[tuple[CalibrationSource, ...]] = ()
    """Sources of the calibration samples, also those of `score.depth`, `prune.refit`, `search` and
    `export.quantize`. Default: `data.sources`."""


class Prune(Settings):
    """Sizes of the student. An omitted axis keeps the teacher's size."""

    hidden: Count | None = None
    """Hidden size: channels of the residual stream."""
    ffn: Count | None = None
    """MLP intermediate size: neurons per layer."""
    heads: Count | None = None
    """Query heads in total, the same number from each KV group. With multi-head attention each head's keys and values
    go with it."""
    kv_groups: Count | None = None
    """KV heads, each with its query heads. The papers keep all of them."""
    experts: Count | None = None
    """Experts per MoE layer."""
    expert_ffn: Count | None = None
    """Neurons per expert."""
    shared_ffn: Count | None = None
    """Neurons of the shared experts, which process every token."""
    layers: Layers | None = None
    """A list of layers to keep, numbered from 0; or the number of layers to keep, chosen by `score.depth`."""
    contiguous: bool = True
    """If `layers` is a number: true removes one block of consecutive layers; false removes the layers found greedily
    (`score.depth.greedy`), or else the least important single layers."""
    teacher: Literal["corrected", "original"] = "corrected"
    """Teacher that is scored and pruned, if the recipe corrects it. The student learns from the corrected one in either
    case."""
    by: Literal["importance", "random", "first"] = "importance"
    """How units are chosen. `random` (seeded by `seed`) and `first` (the lowest indices) are baselines for
    importance."""
    scope: Scope = "layer"
    """`layer` ranks neurons and heads in each layer separately; `network` ranks them by their scores summed over the
    layers, so that every layer keeps the same indices."""
    iterations: Annotated[Count, Field(le=1000)] = 1
    """Score and prune the widths in this many even steps, each on the model left by the step before. Layers are removed
    in the first step. The papers found no gain."""
    merge: Literal["none", Merge] = "none"
    """Head-residual merge: add to a kept head its difference from a removed head, in these projections."""
    merge_sign: Sign = "printed"
    """Sign of the merge: head + (head - partner), as printed in the paper, or head - (head - partner)."""
    refit: Literal["none", Method] = "none"
    """Repair the linear layers of the cut model by least squares on calibration samples, before distillation: each
    layer on the teacher's states (`outputs`), or on the student's own states so far, aiming at the teacher's
    (`sequential`), which makes up for dropped layers too."""
    refit_samples: Count = 1024
    """Calibration samples of the refit; an eighth of them is held out and chooses the ridge strength."""
    refit_ridge: Positive | None = None
    """Ridge strength towards the trimmed weights, relative to the mean square of a layer's inputs; left out: each layer
    takes the one with the least error on the held-out samples."""

    @model_validator(mode="after")
    def _merges_or_refits(self) -> Prune:
        if self.merge != "none" and self.refit != "none":
            raise ValueError("A refit aims at the unmerged heads and would undo prune.merge: set one to none")
        return self

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the width axes that are pruned."""
        return {axis: size for axis in PUBLIC_AXES if (size := getattr(self, axis)) is not None}


class Evaluate(Settings):
    """Evaluation: loss on held-out text, tasks of lm-evaluation-harness, and conversations."""

    samples: Count = 256
    """Held-out sequences per source."""
    micro_batch: HowToRun[Count] = 1
    """Samples per forward pass of one data-parallel rank."""
    suite: Literal["base", "instruct"] | None = None
    """The papers' tasks, with their few-shot examples, metrics and sampling. HumanEval and MBPP need `run_code`;
    `instruct` needs `task_files` with BFCL v2 live, MT-Bench and ChatRAG-Bench, and a `judge` for MT-Bench's score."""
    tasks: tuple[Task, ...] = ()
    """Tasks in addition to the suite."""
    task_files: FilePath | None = None
    """Folder with `<task>/<split>.jsonl` files, in the fields that the task reads; for `bfcl_v2_live`, `mt_bench` and
    `chatrag` it has the files that their authors publish. Default: the harness downloads its tasks."""
    limit: Count | None = None
    """Questions per task. Default: all."""
    truncate: bool = False
    """Cut off the beginning of a prompt that is longer than the model's context. If false, it is an error."""
    chat: bool = False
    """Apply the tokenizer's chat template to prompts, for instruction-tuned models. Always applied in `bfcl_v2_live`,
    `mt_bench` and `chatrag`."""
    judge: AddedLater[Judge | None] = None
    """Model that rates the answers of MT-Bench. Without it they are kept, and have no score."""
    run_code: bool = False
    """Execute the code that models write for HumanEval and MBPP, on the machine of rank 0. It is sandboxed by
    bubblewrap or by unshare's namespaces if available; otherwise by resource limits alone, and only in a container."""

    def wanted(self) -> list[Task]:
        """Return the tasks of the suite and of `tasks`."""
        suite = [each for each in SUITES.get(self.suite or "", ()) if self.run_code or each.name not in PROGRAMS]
        return [*suite, *self.tasks]

    @property
    def uses_template(self) -> bool:
        """Whether prompts go through the tokenizer's chat template."""
        return self.chat or any(task.name in CHAT_TASKS for task in self.wanted())


class Export(Settings):
    """The final Hugging Face folder."""

    dtype: DType = "bfloat16"
    """Dtype of the exported weights."""
    architecture: Architecture = "auto"
    """`auto` writes a Qwen2 model whose hidden size is not heads x head_dim as a Llama with `attention_bias`: it gives
    the same results, and more inference engines can load it. `own` always writes the teacher's architecture."""
    quantize: Literal["none", "fp8"] = "none"
    """`fp8` also writes `export-fp8`, quantised after training by ModelOpt: e4m3, with one scale per weight matrix and
    one per input, calibrated in one process."""
    quantize_samples: Count = 128
    """Calibration samples for quantisation, at most `score.samples`."""
    kv_cache_fp8: bool = False
    """Quantise the KV cache to FP8 too."""


class Bench(Settings):
    """Serving throughput of teacher and student: `minitron bench`."""

    ladder: tuple[tuple[Count, Count], ...] = LADDER
    """[input, output] tokens per request; one workload for each pair."""
    batches: Annotated[tuple[Count, ...], Field(min_length=1)] = (32, 64)
    """Concurrent requests. The papers use 32 and 64."""
    requests: Count = 256
    """Requests per workload, where a server runs the benchmark."""
    tp: Count = 1
    """GPUs per served model (tensor parallel)."""


class Log(Settings):
    """Loggers in addition to `metrics.jsonl`, which always receives all metrics."""

    wandb: Literal["online", "offline"] | None = None
    """Log to a wandb server (`online`), or to `RUN/wandb` for `wandb sync` (`offline`). A resumed run continues the
    same wandb run."""
    project: str = "minitron"
    """wandb project."""
    tensorboard: bool = False
    """Write TensorBoard event files to `RUN/tensorboard`."""


class Recipe(Settings):
    """A run that turns a pretrained checkpoint into a smaller one. Paths are relative to the working directory."""

    model: FilePath
    """The teacher: a Hugging Face folder; `owner/name` of the Hugging Face Hub, or `owner/name@revision`; or a Megatron
    checkpoint (`torch_dist`)."""
    out: HowToRun[FilePath]
    """Run folder."""
    data: Data
    tokenizer: HowToRun[FilePath | None] = None
    """Hugging Face folder with the tokenizer of a Megatron checkpoint. Default: the one that the checkpoint names. Its
    files count as files of the model's folder."""
    student: AddedLater[FilePath | None] = None
    """A model with the teacher's tokenizer, of any family and named as `model` is, which is distilled without pruning:
    in place of `prune`. Its vocabulary may differ from the teacher's in padding."""
    plugins: AddedLater[tuple[Text, ...]] = ()
    """Your own Python modules, imported before the recipe is read, from its folder or from `sys.path`. They run as
    code, with your permissions, on every rank, and add divergences, preference losses, rewards, statistics, depth
    metrics, objectives, model families and stages (CONTRIBUTING.md), which other keys then take by name."""
    seed: Seed = 1
    """Seed of data order, initialisation and random choices."""
    dtype: DType = "bfloat16"
    """Dtype of the weights in training. The optimizer state is fp32."""
    recompute: HowToRun[Recompute] = "none"
    """Activation recomputation, to save memory: `selective` recomputes the MLPs, which have the widest activations;
    `full` recomputes whole layers and stores only their inputs, for about a third more time."""
    spec: HowToRun[Spec] = "local"
    """Layer spec: `local`, Megatron's own layers with this package's norms; `te`, Transformer Engine's layers, with
    norms fused into the linear layers (needs CUDA). Both compute the same function."""
    parallel: HowToRun[Parallel] = Parallel()
    correct: Correct | None = None
    """Teacher correction. If omitted, the teacher is used unchanged."""
    score: Score = Score()
    search: Search | None = None
    """Search the student's shape within a budget. `prune` then must not give sizes."""
    prune: Prune = Prune()
    distill: Distill = Distill()
    align: AddedLater[tuple[AlignRound, ...]] = ()
    """Rounds of alignment after distillation, each from the model of the round before. The second paper: `sft` on maths
    and code, `sft` on instructions, then two rounds of `rpo`."""
    family: AddedLater[tuple[FamilyStudent, ...]] = ()
    """Several students, smaller and smaller, in place of one: each is pruned and distilled by a run of its own, in
    `OUT/NAME`. They share every stage that is the same."""
    random_baseline: bool = False
    """Also distil into a randomly initialised student of the same shape on the same tokens, for comparison."""
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    bench: HowToRun[Bench] = Bench()
    log: HowToRun[Log] = Log()
    hang_seconds: HowToRun[Annotated[float, Field(ge=1)]] = 1800.0
    """Timeout of the watchdog, in seconds. If no rank makes progress for this long, each rank writes its stacks to
    `RUN/stacks` and exits with code 76, so that the job can be restarted."""

    @property
    def frozen_teacher_dtype(self) -> DType:
        """Dtype in which a frozen teacher computes."""
        held = self.distill.teacher_dtype
        return self.dtype if held is None or held == "float8" else held

    @property
    def corrects_first(self) -> bool:
        """Whether the teacher is corrected before anything else."""
        return self.correct is not None and not self.correct.continuous

    @property
    def models(self) -> dict[str, Path]:
        """Key -> place of each model, as the recipe names it."""
        return {"model": self.model} | ({"student": self.student} if self.student else {})

    @property
    def measures_layers(self) -> bool:
        """Whether the importance of layers is measured."""
        searched = self.search is not None and self.search.layers is not None
        return self.score.depth is not None or isinstance(self.prune.layers, int) or searched

    @property
    def needs_scores(self) -> bool:
        """Whether units or layers are chosen by importance."""
        return self.student is None and (self.prune.by == "importance" or self.measures_layers)

    @model_validator(mode="after")
    def _sizes_come_from_one_block(self) -> Recipe:
        prune = self.prune
        if self.family:
            check_family_keys(self.family)
            return self
        if self.student is not None:
            return self._nothing_is_pruned()
        if self.search is None:
            if "prune" not in self.model_fields_set:
                raise ValueError(
                    "prune is missing: give the sizes to keep in `prune`, a `search` for them, or a `student`"
                )
            return self
        if prune.sizes() or prune.layers is not None:
            raise ValueError("Both `search` and `prune` give the sizes: remove the sizes in `prune`, or `search`")
        if prune.by != "importance" or prune.iterations > 1 or prune.merge != "none":
            raise ValueError(
                "A search prunes by importance, in one step, without merging: remove prune.by, iterations and merge"
            )
        return self

    def _nothing_is_pruned(self) -> Recipe:
        given = {"prune": self.prune != Prune(), "search": self.search, "score.depth": self.score.depth}
        for key in [key for key, value in (given | {"distill.start": self.distill.start}).items() if value]:
            raise ValueError(
                f"A `student` is distilled without pruning, from its own weights: remove {key}, or student"
            )
        return self

    @model_validator(mode="after")
    def _states_can_be_read(self) -> Recipe:
        states = self.distill.states
        if self.spec == "te" and states and (states.embedding or states.outputs or states.mlp_inputs):
            raise ValueError(
                "Spec te fuses the norms, so that states after a norm cannot be read: set spec to local, or give only "
                "distill.states.attention"
            )
        return self

    @model_validator(mode="after")
    def _the_teacher_can_train(self) -> Recipe:
        if self.correct is None or not self.correct.continuous:
            return self
        if self.correct.objective != "cross_entropy":
            raise ValueError("correct.continuous trains the teacher by cross-entropy: remove correct.objective")
        if not self.distill.has_teacher:
            raise ValueError(
                f"correct.continuous trains the teacher during distillation, but distill.objective is "
                f"{self.distill.objective}: remove one of them"
            )
        for key in ("offload_teacher", "teacher_window", "teacher_dtype"):
            if getattr(self.distill, key):
                raise ValueError(f"correct.continuous trains the teacher, so distill.{key} cannot apply: remove it")
        return self


def json_schema() -> dict[str, object]:
    """Return the recipe's JSON Schema, with the help of every key."""
    return Recipe.model_json_schema()
