"""Cost of refits: FLOPs, bytes on a rank, and host memory, counted from shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..gpus import GPUS
from ..layout import Shape, flops_per_token
from ..parallel import Topology
from ..recipe import Recipe
from ..refit import MOMENT_ROWS, MOMENT_TOKENS, RIDGES, SITES, cut_sites, known_sites, shared_sites
from .memory import WEIGHT_BYTES, model_bytes
from .sizes import Sizes

__all__ = ["RefitCost", "host_bytes", "refit_bytes", "refit_cost", "refit_flops"]

FP64_SHARE = (GPUS["H100"].fp64_flops or 0) / GPUS["H100"].flops
"""FP64 matrix products over dense bf16 ones, peak of an H100."""


@dataclass(frozen=True)
class RefitCost:
    """Cost of a recipe's refits; zeros where nothing is refitted."""

    prune_flops: int
    """FLOPs of the student's refit."""
    search_flops: int
    """FLOPs of the refits of a search's candidates."""
    delay: float
    """FLOPs in bf16 that take as long as refits take longer than their FLOPs say: fp64 is slower, and pipeline stages
    take turns."""
    rank_bytes: int
    """Bytes of the fullest rank: weights of both models and the largest layer's normal equations."""
    host_bytes: int
    """Host memory per rank: the states of both models at one layer, of this rank's samples, or the teacher's at one
    layer and the second moments that a search's candidates share."""


def refit_cost(recipe: Recipe, sizes: Sizes, dp: int) -> RefitCost:
    """Return the cost of the student's refit and of those of a search: each candidate when it is measured, the best
    again before their light distillation. dp: ranks that share the samples."""
    if recipe.prune.refit == "none":
        return RefitCost(0, 0, 0.0, 0, 0)
    teacher, student, light = sizes.teacher, sizes.student, recipe.search.light if recipe.search else None
    shapes = [each.shape for each in sizes.candidates]
    shared = shared_sites(recipe.prune.refit, teacher, shapes)
    own = refit_flops(recipe, teacher, student)
    others = [shared_flops(recipe, teacher, shared)] if shared else []
    others += [refit_flops(recipe, teacher, shape, shared) for shape in shapes]
    others += [refit_flops(recipe, teacher, shape) for shape in shapes[: light.top if light else 0]]
    return RefitCost(
        prune_flops=sum(own),
        search_flops=sum(map(sum, others)),
        delay=sum(
            (forward + exact / FP64_SHARE) * recipe.parallel.pp - forward - exact for forward, exact in (own, *others)
        ),
        rank_bytes=max(
            refit_bytes(recipe, teacher, student),
            *(refit_bytes(recipe, teacher, shape, shared) for shape in shapes),
            shared_bytes(recipe, teacher, shared),
        ),
        host_bytes=max(host_bytes(recipe, teacher, student, dp), shared_host_bytes(recipe, teacher, shared, dp)),
    )


class _Site(NamedTuple):
    """A kind of linear layer that is refitted."""

    copies: int
    """How many a model has."""
    inputs: int
    outputs: int
    targets: int
    """Numbers of a token besides its inputs that moments are taken of."""
    share: float = 1.0
    """Tokens that each of them sees, of all."""
    point: str = ""
    """Name in `SITES`, where it is there."""

    @property
    def size(self) -> int:
        return self.inputs + self.targets


def _sites(teacher: Shape, student: Shape) -> Iterator[_Site]:
    hidden, layers = student.hidden, student.layers
    attention, gate = student.heads * student.head_dim, 2 if student.gated else 1
    sent = teacher.experts_per_token / student.experts if student.experts else 1.0
    mlps = [(student.ffn, layers, 1.0), (student.expert_ffn, layers * student.experts, sent)]
    mlps = [(size, count, share) for size, count, share in [*mlps, (student.shared_ffn, layers, 1.0)] if size and count]
    yield _Site(layers, attention, hidden, hidden, point="proj")
    for size, count, share in mlps:
        yield _Site(count, size, hidden, hidden, share, "" if student.experts else "fc2")
    if student.hidden == teacher.hidden:
        return
    yield _Site(layers, hidden, attention + 2 * student.kv_groups * student.head_dim, teacher.hidden)
    for size, count, share in mlps:
        yield _Site(count, hidden, gate * size, teacher.hidden, share)
    yield _Site(1, hidden, 1 if student.tied else student.padded_vocab, teacher.hidden)


def refit_flops(recipe: Recipe, teacher: Shape, student: Shape, shared: Collection[str] = ()) -> tuple[int, int]:
    """Return FLOPs of forward passes, and FLOPs of fp64 moments and solves.

    The teacher runs once. Of the student every layer runs to its output projection, where the residual stream was cut
    to the MLP's input too, and to its end; `sequential` runs it once more with its new weights. Nothing runs for a
    projection that reads what the teacher's reads, where its moments are `shared` or no unit of it was cut.
    """
    keys = recipe.prune
    assert keys.refit != "none"
    known, cut = known_sites(keys.refit, teacher, student), cut_sites(teacher, student)
    given = known & cut & set(shared)
    free = known - cut | given
    tokens, sequence = keys.refit_samples * recipe.data.sequence, recipe.data.sequence
    one, two = (flops_per_token(student.resized(layers=layers), sequence) for layers in (1, 2))
    width = student.ffn or student.expert_ffn * student.experts_per_token + student.shared_ffn
    attention = two - one - 2 * (3 if student.gated else 2) * student.hidden * width
    to_projection = ("proj" not in free) + (student.hidden < teacher.hidden) + (student.experts > 0)
    to_end = ("fc2" not in free) + (keys.refit == "sequential")
    forward = student.layers * (attention * to_projection + (two - one) * to_end)
    if free != set(SITES):
        forward += flops_per_token(teacher, sequence)
    ridges = 1 if keys.refit_ridge else len(RIDGES)
    exact = 0.0
    for site in _sites(teacher, student):
        if site.point not in free:
            exact += site.copies * tokens * site.share * site.size * (site.size + MOMENT_ROWS)
        if site.point not in known - cut:
            exact += site.copies * ridges * (site.inputs**3 / 3 + 4 * site.outputs * site.inputs**2)
    return forward * tokens, round(exact)


def shared_flops(recipe: Recipe, teacher: Shape, shared: Collection[str]) -> tuple[int, int]:
    """Return FLOPs of the teacher's forward pass, and of the fp64 moments that the refits of its cuts share."""
    tokens = recipe.prune.refit_samples * recipe.data.sequence
    moments = sum(size * (size + MOMENT_ROWS) for size in _shared_sizes(teacher, shared))
    return flops_per_token(teacher, recipe.data.sequence) * tokens, teacher.layers * tokens * moments


def _shared_sizes(teacher: Shape, shared: Collection[str]) -> list[int]:
    return [site.inputs for site in _sites(teacher, teacher) if site.point in shared]


def refit_bytes(recipe: Recipe, teacher: Shape, student: Shape, shared: Collection[str] = ()) -> int:
    """Return the most that a rank holds of weights, normal equations, `shared` ones too, and the vectors they are made
    of; the activations of a layer's own forward pass are not counted."""
    topology = Topology.of(recipe.parallel)
    both = zip(
        *(model_bytes(shape, topology, recipe.dtype) for shape in (teacher, student)),
        strict=True,
    )
    tokens = recipe.score.micro_batch * recipe.data.sequence
    sites = [
        _site_bytes(site, tokens, topology.tp, student.experts if site.share < 1 else 1)
        for site in _sites(teacher, student)
    ]
    sites += [
        _given_bytes(*sizes, student.hidden // topology.tp, topology.tp)
        for sizes in _given_sizes(teacher, student, shared)
    ]
    return max(sum(pair) for pair in both) + max(sites)


def _given_sizes(teacher: Shape, student: Shape, shared: Collection[str]) -> list[tuple[int, int]]:
    """(inputs of the teacher's projection, of the student's) where a refit takes shared moments."""
    both = zip(*(_shared_sizes(shape, shared) for shape in (teacher, student)), strict=True)
    return [(whole, kept) for whole, kept in both if kept < whole and student.hidden == teacher.hidden]


def _given_bytes(whole: int, kept: int, rows: int, tp: int) -> int:
    """The teacher's moments, a part of them once more where they are gathered, and the columns and rows that stay; a
    solve's Gram matrix with its ridge and factor, and seven matrices of the rows that a rank solves for."""
    gathered = whole**2 // tp if tp > 1 else 0
    return 2 * 8 * (whole**2 + gathered + whole * kept + 2 * kept**2) + 7 * 8 * rows * kept


def _site_bytes(site: _Site, tokens: int, tp: int, together: int) -> int:
    """Moments of the layers that are taken together, and the larger of two: the vectors of a micro-batch, their inputs
    and some in fp64; the gathered moments and a solve's Gram matrix with its ridge and factor."""
    moments = 2 * 8 * site.size**2
    chosen = round(tokens * site.share)
    adding = chosen * (site.size + site.inputs) * 4 + min(chosen, MOMENT_TOKENS) * site.size * (4 + 8)
    solving = (moments * (1 + 1 / tp) if tp > 1 else 0) + 2 * 8 * site.inputs**2
    return round(together * moments / tp + max(adding, solving))


def host_bytes(recipe: Recipe, teacher: Shape, student: Shape, dp: int) -> int:
    """Return the bytes of the residual streams of a rank's samples and what is kept of the teacher's layer at work."""
    tokens = recipe.prune.refit_samples * recipe.data.sequence // dp
    split = recipe.parallel.tp if recipe.parallel.sequence_parallel else 1
    narrow = student.hidden < teacher.hidden
    read = 2 if narrow else int(student.experts > 0)
    theirs = 3 + read + min(teacher.layers - student.layers, 2)
    ours = 2 if recipe.prune.refit == "sequential" else 1
    return tokens * (theirs * teacher.hidden + ours * student.hidden) * WEIGHT_BYTES[recipe.dtype] // split


def shared_bytes(recipe: Recipe, teacher: Shape, shared: Collection[str]) -> int:
    """Return the most that a rank holds of the teacher and the shared moments of a layer, while they are made: the
    moments and the vectors in fp64, or their rows twice."""
    if not shared:
        return 0
    topology, tokens = Topology.of(recipe.parallel), recipe.score.micro_batch * recipe.data.sequence
    sizes = _shared_sizes(teacher, shared)
    moments = sum(2 * 8 * size**2 // topology.tp for size in sizes)
    adding = tokens * sum(sizes) * 4 + min(tokens, MOMENT_TOKENS) * max(sizes) * (4 + 8)
    weights = max(model_bytes(teacher, topology, recipe.score.dtype))
    return weights + moments + max(adding, 2 * 8 * max(sizes) ** 2 // topology.tp)


def shared_host_bytes(recipe: Recipe, teacher: Shape, shared: Collection[str], dp: int) -> int:
    """Return the bytes of a rank's part of the shared moments, and of the teacher's states before and after a layer."""
    if not shared:
        return 0
    keys = recipe.parallel
    layers = -(-teacher.layers // keys.pp)
    moments = sum(layers * 2 * 8 * size**2 // (keys.tp * dp) for size in _shared_sizes(teacher, shared))
    tokens = recipe.prune.refit_samples * recipe.data.sequence // dp
    states = 2 * tokens * teacher.hidden * WEIGHT_BYTES[recipe.score.dtype]
    return moments + states // (keys.tp if keys.sequence_parallel else 1)
