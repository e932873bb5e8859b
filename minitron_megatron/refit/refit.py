"""The repair of a trimmed model, layer after layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Batch
from ..errors import PlanError, expect_number
from ..events import Event, Listener, silent
from ..layout import lookup
from ..model import Chunk, Model, chunks_of, evaluating, run_layer, shape_of
from ..parallel import Topology, fail_together, gather_objects
from ..records import Plan
from .mixture import Routed, refit_experts, routed
from .moments import Moments, unshard
from .shared import SITES, Method, SharedMoments, cut_sites, known_sites
from .solve import RIDGES
from .streams import Stream, Work
from .weights import SiteFit, Weights

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

__all__ = ["refit"]

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@torch.no_grad()
def refit(
    student: Model,
    teacher: Model,
    plan: Plan,
    batches: Sequence[Batch],
    topology: Topology,
    *,
    method: Method = "sequential",
    ridges: Sequence[float] = RIDGES,
    shared: SharedMoments | None = None,
    listener: Listener = silent,
) -> list[SiteFit]:
    """Repair a trimmed model in place by least squares on calibration activations; returns each layer's errors.

    student: what `trim(teacher, plan)` gives; teacher: the model before the cut, on the same ranks. Attention's and the
    MLP's output projections are fitted to the teacher's residual stream after them, layers whose input was cut to the
    teacher's outputs. Each fit is a ridge regression towards the trimmed weights, its strength the one of `ridges` with
    the least error on held-out samples, an eighth of all; a layer that none improves keeps its weights. A tied output
    layer stays the embedding, and the final norm before it is scaled, channel by channel, instead. shared: the
    teacher's moments on the same batches; `outputs` takes from them what it would find itself. The result does not
    depend on the parallel layout. Collective over the world. Raises PlanError for models that do not fit the plan
    and activations that are not finite, and DataError for fewer than 2 samples.
    """
    students, teachers = chunks_of(student), chunks_of(teacher)
    with fail_together():
        _check(students, teachers, plan, method, ridges, shared)
    with evaluating([*students, *teachers]):
        run = _Run(students, teachers, plan, batches, topology, method, ridges, shared)
        run.everything(listener)
    return [fit for stage in gather_objects(run.weights.fits, topology.pp_group) for fit in stage]


def _check(
    students: Sequence[Chunk],
    teachers: Sequence[Chunk],
    plan: Plan,
    method: str,
    ridges: Sequence[float],
    shared: SharedMoments | None = None,
) -> None:
    if method not in get_args(Method):
        raise PlanError(f"refit method {method!r} is not known. Use {' or '.join(get_args(Method))}.")
    if not ridges:
        raise PlanError("a refit needs one ridge strength at least.")
    for ridge in ridges:
        expect_number("a ridge strength of a refit", ridge, above=0)
    if shared and (unlike := shared.shape.differences(plan.shape)):
        raise PlanError(f"the shared moments are another model's: it has {unlike}. Take those of the plan's teacher.")
    for chunks, shape, whose in ((students, plan.target, "student"), (teachers, plan.shape, "teacher")):
        for chunk in chunks:
            if not hasattr(chunk, "decoder"):
                raise PlanError(f"a refit works on a bare GPTModel, not on {type(chunk).__name__}: pass model.module.")
            if unlike := shape_of(chunk).differences(shape):
                raise PlanError(f"the {whose} is not the plan's: it has {unlike}. Give the model of this plan.")


class _Run:
    """A refit at work on this rank."""

    def __init__(
        self,
        students: Sequence[Chunk],
        teachers: Sequence[Chunk],
        plan: Plan,
        batches: Sequence[Batch],
        topology: Topology,
        method: Method,
        ridges: Sequence[float],
        shared: SharedMoments | None,
    ) -> None:
        self.plan, self.topology, self.method, self.shared = plan, topology, method, shared
        self.weights = Weights(students, teachers, plan, topology, ridges)
        with fail_together():
            self.work = Work(students, teachers, batches, topology)
        hidden = plan.keep_at(None).get("hidden", torch.arange(plan.shape.hidden))
        self.channels = hidden.to(topology.device)
        self.tokens = self.work.counted()
        if shared and not shared.tokens.equal(self.tokens):
            raise PlanError(
                "the shared moments are of other samples. Give the refit the batches that they were made of."
            )
        self.narrow = len(hidden) < plan.shape.hidden
        """Whether the layers that read the residual stream had their input cut."""
        known = known_sites(method, plan.shape, plan.target)
        self.whole = known - cut_sites(plan.shape, plan.target)
        """Points where student and teacher have the same: nothing lacks there."""
        self.given = (known - self.whole) & set(shared.points if shared else ())
        """Points whose moments are `shared`."""

    def everything(self, listener: Listener) -> None:
        """Repair every layer in order, the states going from stage to stage, and then the output layer."""
        if self.whole | self.given == set(SITES):
            self._from_shared(listener)
            return
        ours, theirs = self.work.begin()
        ours = ours if self.method == "sequential" else []
        layers, stage = self.plan.kept_layers, 0
        theirs = self._through(theirs, range(layers[0]), stage)
        for number, (source, following) in enumerate(pairwise([*layers, self.plan.shape.layers])):
            target = self.topology.stage_of(number, len(layers))
            if ours:
                ours = self.work.passed_on(ours, self.plan.target.hidden, stage, target)
            theirs = self.work.passed_on(theirs, self.plan.shape.hidden, stage, target)
            stage = target
            ours, theirs = self._layer(number, source, following, ours, theirs, stage)
            listener(Event("refit", number + 1, len(layers), "layers"))
        with fail_together():
            if self.narrow and self.topology.pp_rank == stage:
                self._output_layer(self._fed(ours, theirs), theirs)

    def _from_shared(self, listener: Listener) -> None:
        """Repair every layer from the teacher's moments: no state has to be computed."""
        layers = self.plan.kept_layers
        for number, source in enumerate(layers):
            stage = self.topology.stage_of(number, len(layers))
            moments = self._shared_at(source, stage)
            with self.work.teacher_layer(source, self.plan.shape.layers, stage) as teacher, fail_together():
                if teacher is not None:
                    for point in SITES:
                        self._match_known(number, source, teacher.layer_number - 1, point, moments)
            listener(Event("refit", number + 1, len(layers), "layers"))

    def _shared_at(self, source: int, stage: int) -> dict[str, Tensor | None]:
        """The moments of a teacher's layer that are given, on a stage. Collective over that stage and the layer's."""
        return {point: self.shared.at(source, point, stage) for point in SITES if self.shared and point in self.given}

    def _fed(self, ours: Stream, theirs: Stream) -> Stream:
        """The states that the student's next layer is repaired on."""
        return ours if self.method == "sequential" else [states[..., self.channels.cpu()] for states in theirs]

    def _layer(
        self, number: int, source: int, following: int, ours: Stream, theirs: Stream, stage: int
    ) -> tuple[Stream, Stream]:
        """Repair a layer; returns the states after it, the teacher's after the dropped layers too."""
        here, seen = self.topology.pp_rank == stage, dict[str, Stream]()
        fed: Stream = []
        moments = self._shared_at(source, stage)
        with self.work.teacher_layer(source, self.plan.shape.layers, stage) as teacher, fail_together():
            if here:
                fed = self._fed(ours, theirs)
                seen = self._seen(teacher, theirs, self._points)
                self._read_layer(number, source, teacher, fed, seen, moments)
        after = self._through(seen.get("out", theirs), range(source + 1, following), stage)
        with fail_together():
            if here:
                self._written(number, fed, after if self.method == "sequential" else seen["out"])
                if self.method == "sequential":
                    ours = [self._run(number, at, ours, "out")["out"].cpu() for at in range(len(ours))]
        return ours, after

    def _through(self, stream: Stream, layers: range, stage: int) -> Stream:
        """The teacher's states after more of its layers."""
        for number in layers:
            with self.work.teacher_layer(number, self.plan.shape.layers, stage) as layer:
                if layer is not None:
                    stream = self._seen(layer, stream, ("out",))["out"]
        return stream

    @property
    def _points(self) -> tuple[str, ...]:
        """Points of a teacher's layer whose states are kept."""
        read = ("qkv", "mlp") if self.narrow else ("mlp",) if self.plan.shape.experts else ()
        return ("middle", "out", *read)

    def _seen(self, layer: TransformerLayer, stream: Stream, points: Sequence[str]) -> dict[str, Stream]:
        """The streams at points of a teacher's layer."""
        found: dict[str, Stream] = {point: [] for point in points}
        for states, arguments in zip(stream, self.work.arguments, strict=True):
            seen = run_layer(layer, arguments, self.work.here(states), points)
            for point in points:
                found[point].append(self.work.kept(seen[point]))
        return found

    def _run(self, number: int, batch: int, stream: Stream, *points: str) -> dict[str, Any]:
        """Tensors that pass points of the student's layer in a micro-batch."""
        layer, states = self.work.student_layers[number], self.work.here(stream[batch])
        return run_layer(layer, self.work.arguments[batch], states, points)

    def _read_layer(
        self,
        number: int,
        source: int,
        teacher: TransformerLayer,
        ours: Stream,
        seen: dict[str, Stream],
        moments: dict[str, Tensor | None],
    ) -> None:
        """Repair all of a layer but its last projection; the teacher's is on this stage."""
        shell = teacher.layer_number - 1
        if self.narrow:
            self._match_outputs(number, source, shell, "qkv", ours, seen["qkv"], ("self_attention.linear_qkv.weight",))
        if "proj" in self.whole | self.given:
            self._match_known(number, source, shell, "proj", moments)
        else:
            name = f"decoder.layers.{number}.{SITES['proj']}"
            self._match_stream(number, "proj", "middle", name, ours, seen["middle"])
        if self.narrow:
            self._match_outputs(number, source, shell, "mlp", ours, seen["mlp"], self._mlp_readers())
        if self.plan.shape.experts:
            inputs: list[Routed] = [
                routed(self.work, self._run(number, batch, ours, "mlp", "router")) for batch in range(len(ours))
            ]
            refit_experts(
                self.work,
                self.weights,
                number,
                source,
                shell,
                inputs,
                seen["mlp"],
                self.channels,
                narrow=self.narrow,
            )

    def _mlp_readers(self) -> tuple[str, ...]:
        """Matrices that read the MLP's normed input, the experts' own aside."""
        shape = self.plan.shape
        if not shape.experts:
            return ("mlp.linear_fc1.weight",)
        shared = ("mlp.shared_experts.linear_fc1.weight",) if shape.shared_ffn else ()
        return ("mlp.router.weight", *shared, *(("mlp.shared_experts.gate_weight",) if shape.shared_gate else ()))

    def _match_outputs(
        self, number: int, source: int, shell: int, point: str, ours: Stream, theirs: Stream, leaves: Sequence[str]
    ) -> None:
        """Fit layers that read one input to the outputs of the teacher's."""
        moments = Moments(self.plan.shape.hidden + self.plan.target.hidden, self.topology)
        for batch, (states, kind) in enumerate(zip(theirs, self.work.kinds, strict=True)):
            mine = self._run(number, batch, ours, point)[point]
            moments.add(torch.cat([self.work.whole(self.work.here(states)), self.work.whole(mine)], -1), kind)
        sums, tokens = moments.total()
        for leaf in leaves:
            name = f"decoder.layers.{number}.{leaf}"
            target = self.weights.whole("teacher", f"decoder.layers.{shell}.{leaf}")
            present = self.weights.whole("student", name)
            self.weights.fit_to_outputs(name, self.weights.kept(target, name, source), sums, tokens, present)

    def _match_known(self, number: int, source: int, shell: int, point: str, moments: dict[str, Tensor | None]) -> None:
        """Fit an output projection whose input is the teacher's, of the units that stay, without running anything."""
        name = f"decoder.layers.{number}.{SITES[point]}"
        if point in self.whole:
            self.weights.no_error(name, self.tokens)
            return
        target, given = self.weights.whole("teacher", f"decoder.layers.{shell}.{SITES[point]}"), moments[point]
        assert given is not None
        self.weights.fit_to_own_inputs(name, target, given, self.tokens, self.weights.whole("student", name), source)

    def _written(self, number: int, ours: Stream, aim: Stream) -> None:
        """Repair the last projection of a layer, where one projection gives its output."""
        mlp = "mlp.shared_experts" if self.plan.shape.experts else "mlp"
        if not self.plan.shape.experts or self.plan.shape.shared_ffn:
            self._match_stream(number, "fc2", "out", f"decoder.layers.{number}.{mlp}.linear_fc2.weight", ours, aim)

    def _match_stream(self, number: int, point: str, after: str, name: str, ours: Stream, aim: Stream) -> None:
        """Fit the layer whose input passes `point` to what the stream lacks at `after`."""
        param, present = lookup(name), self.weights.whole("student", name)
        moments = Moments(sum(present.shape), self.topology)
        gate = f"decoder.layers.{number}.mlp.shared_experts.gate_weight"
        gated = "shared_experts" in name and self.plan.shape.shared_gate
        for batch, (states, kind) in enumerate(zip(aim, self.work.kinds, strict=True)):
            seen = self._run(number, batch, ours, point, after, *(("mlp",) if gated else ()))
            lacks = self.work.here(states)[..., self.channels].float() - seen[after].float()
            x = unshard(seen[point].flatten(0, 1), 1, param, 1, self.plan.target.sizes(), self.topology).float()
            if gated:
                x = x * torch.sigmoid(F.linear(self.work.whole(seen["mlp"]), self.weights.whole("student", gate)))
            moments.add(torch.cat([self.work.whole(lacks), x], -1), kind)
        self.weights.fit_to_residuals(name, *moments.total(), present)

    def _output_layer(self, ours: Stream, theirs: Stream) -> None:
        """Fit the output layer to the teacher's logits, or the final norm where the output layer is the embedding."""
        norms = [chunks[-1].decoder.final_layernorm for chunks in (self.work.teacher, self.work.student)]
        moments = Moments(self.plan.shape.hidden + self.plan.target.hidden, self.topology)
        for teachers, students, kind in zip(theirs, ours, self.work.kinds, strict=True):
            both = zip(norms, (teachers, students), strict=True)
            normed = [self.work.whole(norm(self.work.here(states))) for norm, states in both]
            moments.add(torch.cat(normed, -1), kind)
        if self.plan.shape.tied:
            self.weights.fit_norm("decoder.final_layernorm.weight", EMBEDDING, *moments.total())
            return
        target, present = (self.weights.whole(whose, OUTPUT) for whose in ("teacher", "student"))
        self.weights.fit_to_outputs(OUTPUT, target, *moments.total(), present)
