"""Search of the layout of a recipe's distillation: a formula orders all layouts, and the best few are rehearsed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product

from ..convert import read_config
from ..errors import MinitronError, TopologyError, expect_number
from ..events import Event, Listener, silent
from ..forecast import check, count, planned, student_shape, with_model_folders
from ..gpus import Gpu
from ..layout import Shape, flops_per_token, parameters
from ..recipe import Recipe
from .clock import BANDWIDTH, LAUNCH, LINK, MATMUL, NETWORK, NODE
from .rehearse import GIB, Rehearsal, gpu_named, rehearse

__all__ = ["Layout", "PlannedLayout", "plan_layouts"]

TRIED = 4
"""Layouts that are rehearsed."""
LONG = 8192
"""Tokens of a sample from which on context parallelism is tried."""
PASSES = {"none": 3.0, "selective": 3.6, "full": 4.0}
"""Student's passes of a step, in forward passes: the backward pass is two, and recomputation part of one more."""
LOSS_BYTES = 22
"""Bytes of memory that the loss touches for each token and entry of the vocabulary."""
GRADIENT_BYTES, OUTPUT_BYTES = 10, 50
"""Bytes of memory that a micro-batch touches for each parameter, whose gradient it adds up, and for each one of the
output layer, to whose gradient the loss adds in about four chunks."""
KERNELS = 30
"""Kernels of a layer's forward pass."""


@dataclass(frozen=True)
class Layout:
    """The settings that decide how fast a step is, and how much a rank holds."""

    tp: int
    pp: int
    vp: int
    cp: int
    ep: int
    micro_batch: int
    recompute: str
    offload: bool

    @property
    def sizes(self) -> dict[str, int]:
        return {"tp": self.tp, "pp": self.pp, "vp": self.vp, "cp": self.cp, "ep": self.ep}

    def of(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this layout."""
        parallel = recipe.parallel.replaced(**self.sizes, sequence_parallel=self.tp > 1)
        distill = recipe.distill.replaced(micro_batch=self.micro_batch, offload_teacher=self.offload)
        return recipe.replaced(parallel=parallel, distill=distill, recompute=self.recompute)

    @classmethod
    def own(cls, recipe: Recipe) -> Layout:
        """Return the layout that a recipe has."""
        keys, distill = recipe.parallel, recipe.distill
        sizes = keys.tp, keys.pp, keys.vp, keys.cp, keys.ep
        return cls(*sizes, distill.micro_batch, recipe.recompute, distill.offload_teacher)

    def block(self) -> str:
        """Return its keys, as YAML."""
        given = [f"{name}: {size}" for name, size in self.sizes.items() if size > 1]
        given += ["sequence_parallel: true"] if self.tp > 1 else []
        lines = [f"parallel: {{{', '.join(given)}}}", f"recompute: {self.recompute}", "distill:"]
        lines += [f"  micro_batch: {self.micro_batch}", *(["  offload_teacher: true"] if self.offload else [])]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        named = [f"{name} {size}" for name, size in self.sizes.items() if size > 1 or name == "tp"]
        named += [f"micro-batch {self.micro_batch}"]
        named += [f"{self.recompute} recompute"] if self.recompute != "none" else []
        return ", ".join([*named, *(["teacher offloaded"] if self.offload else [])])


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that was rehearsed. Every number is modelled, not measured."""

    layout: Layout
    by_formula: float
    """Seconds of a step by the formula that chose what to rehearse."""
    found: Rehearsal


def plan_layouts(
    recipe: Recipe, *, gpus: int, gpu: str = "H100", memory: float = 80.0, listener: Listener = silent
) -> list[PlannedLayout]:
    """Return the layouts that were rehearsed and fit, the fastest step first; the recipe's own is rehearsed too.

    gpu: a name in `GPUS`. memory: GiB of a GPU. Global batch, sequence and the student stay as they are, and with them
    the results. Needs what `rehearse` needs. Raises TopologyError where no layout fits.
    """
    expect_number("gpus", gpus, at_least=1, whole=True)
    step = _Step.of(recipe, gpus, gpu_named(gpu))
    own = Layout.own(recipe)
    tried = list(dict.fromkeys(([own] if _passes(recipe, own, gpus) else []) + _fitting(recipe, step, memory)))
    if not tried:  # a fault of the recipe itself is better told than that no layout fits
        check(recipe, planned(recipe, gpus), counts_only=True)
    rehearsed = []
    for number, layout in enumerate(tried, 1):
        found = rehearse(layout.of(recipe), gpus=gpus, gpu=gpu, memory=memory)
        if found.fits:
            rehearsed.append(PlannedLayout(layout, step.seconds(layout), found))
        listener(Event("plan", number, len(tried), "layouts"))
    if not rehearsed:
        raise TopologyError(
            f"No layout of {gpus} GPUs with {memory:g} GiB was found that fits (modelled, not measured). Give more "
            "GPUs, or save teacher memory (distill.teacher_dtype, teacher_window)."
        )
    return sorted(rehearsed, key=lambda each: each.found.seconds)


def _fitting(recipe: Recipe, step: _Step, memory: float) -> list[Layout]:
    """Return the layouts with the shortest steps by the formula that pass the checks and fit by it; those that offload
    the teacher only where no other one fits."""
    for offload in dict.fromkeys((recipe.distill.offload_teacher, recipe.distill.has_teacher)):
        ordered = sorted(_layouts(recipe, step, offload), key=step.seconds)
        if found := [*islice((each for each in ordered if _fits(recipe, each, step, memory)), TRIED)]:
            return found
    return []


def _fits(recipe: Recipe, layout: Layout, step: _Step, memory: float) -> bool:
    if not _passes(recipe, layout, step.gpus):
        return False
    return count(layout.of(recipe), gpus=step.gpus).rank_bytes + step.activations(layout) <= memory * GIB


def _passes(recipe: Recipe, layout: Layout, gpus: int) -> bool:
    """Return whether a recipe with this layout passes the checks of a run."""
    changed = layout.of(recipe)
    try:
        check(changed, planned(changed, gpus), counts_only=True)
    except MinitronError:
        return False
    return True


def _layouts(recipe: Recipe, step: _Step, offload: bool) -> Iterator[Layout]:
    """Yield the layouts whose sizes divide the GPUs, the batch and the model."""
    shapes = (step.student, step.teacher)
    experts = min(each.experts for each in shapes)
    sizes = product(
        (1, 2, 4, 8),
        (1, 2, 4, 8, 16),
        (1, 2),
        (1, 2, 4) if recipe.data.sequence >= LONG else (1,),
        [size for size in (1, 2, 4, 8) if size == 1 or (experts and experts % size == 0)],
        (1, 2, 3, 4, 6, 8),
        PASSES,
    )
    for tp, pp, vp, cp, ep, micro_batch, recompute in sizes:
        layout = Layout(tp, pp, vp, cp, ep, micro_batch, recompute, offload)
        replicas, rest = divmod(step.gpus, tp * pp * cp)
        if rest or recipe.distill.global_batch % (replicas * micro_batch) or (vp > 1 and pp == 1):
            continue
        if any(each.layers < pp * vp or each.kv_groups % tp for each in shapes):
            continue
        yield layout


@dataclass(frozen=True)
class _Step:
    """A step of distillation on some GPUs."""

    gpus: int
    gpu: Gpu
    teacher: Shape
    student: Shape
    sequence: int
    batch: int
    """Samples of a step."""

    @classmethod
    def of(cls, recipe: Recipe, gpus: int, gpu: Gpu) -> _Step:
        found = with_model_folders(recipe)
        teacher = read_config(found.model).shape
        student = student_shape(found, teacher)
        return cls(gpus, gpu, teacher, student, recipe.data.sequence, recipe.distill.global_batch)

    def seconds(self, layout: Layout) -> float:
        """Return the seconds of a step by formula, on the last pipeline stage, which has the output layers and the
        loss: matrix products, other traffic of memory, communication of tp and cp, pipeline bubbles, gathering of
        parameters; gradients are reduced meanwhile."""
        replicas = self.gpus // (layout.tp * layout.pp * layout.cp)
        tokens = self.batch * self.sequence / replicas / layout.cp
        micro_batches = self.batch / (replicas * layout.micro_batch)
        passes = PASSES[layout.recompute]
        models = ((self.student, passes), (self.teacher, 1.0))
        outputs = 2 * sum(min(times, 3.0) * shape.hidden * shape.vocab for shape, times in models)
        whole = sum(times * flops_per_token(shape, self.sequence) for shape, times in models)
        flops = (whole - outputs) / layout.pp + outputs
        touched = sum(times * _touched(shape) for shape, times in models) / layout.pp + LOSS_BYTES * self.student.vocab
        busy = flops / (MATMUL * self.gpu.flops) + touched / (BANDWIDTH * self.gpu.bandwidth)
        layers = sum(times * shape.layers for shape, times in models) / layout.pp
        held = parameters(self.student) / (layout.tp * layout.pp)
        summed = GRADIENT_BYTES * held + OUTPUT_BYTES * self.student.vocab * self.student.hidden / layout.tp
        summing = micro_batches * summed / (BANDWIDTH * self.gpu.bandwidth)
        compute = max(busy * tokens / layout.tp + summing, KERNELS * layers * micro_batches * LAUNCH)
        widths = (passes - 1) * self.student.layers * self.student.hidden + self.teacher.layers * self.teacher.hidden
        sent = 8 * tokens * widths / layout.pp * (layout.tp - 1) / layout.tp  # two all-reduces of 2 bytes a pass
        keys = sum(times * shape.layers * shape.kv_groups * shape.head_dim for shape, times in models)
        sent += 4 * tokens * (layout.cp - 1) * keys / (layout.tp * layout.pp)  # keys and values of the other ranks
        compute += sent / (LINK * self.gpu.link)
        rate = LINK * self.gpu.link if self.gpus <= NODE else NETWORK
        return compute * (1 + (layout.pp - 1) / (layout.vp * micro_batches)) + 2 * held / rate

    def activations(self, layout: Layout) -> float:
        """Return the bytes of the student's activations on the first pipeline stage, by formula."""
        shape, tokens = self.student, layout.micro_batch * self.sequence / layout.cp
        attention, mlp = 2 * (6 * shape.hidden + 3 * _heads(shape)), 2 * 3 * _neurons(shape)
        kept = {"none": attention + mlp, "selective": attention, "full": 2 * shape.hidden}[layout.recompute]
        return kept * tokens * shape.layers / layout.tp


def _touched(shape: Shape) -> float:
    """Return the bytes of a forward pass per token that its element-wise operations read and write."""
    return 2 * shape.layers * (14 * shape.hidden + 4 * _heads(shape) + 8 * _neurons(shape))


def _heads(shape: Shape) -> int:
    return (shape.heads + 2 * shape.kv_groups) * shape.head_dim


def _neurons(shape: Shape) -> int:
    return shape.ffn + shape.experts_per_token * shape.expert_ffn + shape.shared_ffn
