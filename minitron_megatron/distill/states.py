"""Loss between hidden states of student and teacher, at every parallel layout."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..data import Batch
from ..errors import RecipeError
from ..layout import lookup
from ..losses import attach_loss, relation_loss, state_loss
from ..model import Chunk, Model, chunks_of, shape_of
from ..parallel import Topology, local_sequence, sum_over_world
from .bridge import attach, detach
from .pairs import ATTENTION, MLP_INPUTS, OUTPUTS, LayerPair, StatePairs, at_layer

__all__ = ["StateLoss"]

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
RELATIONS = ("q", "k", "v")

ModuleOutput = Tensor | tuple[Tensor, Tensor | None]
"""Output of a module; mcore's linear layers return (output, bias)."""


class StateTap(NamedTuple):
    """Point at which a state is read: the output of a module. The embedding is the output of layer -1."""

    kind: str
    layer: int


class StateLoss:
    """Loss alpha * L_is, where L_is is the mean over the pairs of a per-token loss, added to the divergence of the
    logits (section 3).

    `dynamic`: alpha = L_logits / L_is, constant within a step, both means over the tokens of a global batch, so that
    it does not depend on the layout or the micro-batch. The paper uses the ratio of the same step; here it is that of
    the step before, because backward passes begin before the last forward pass ends, and the step's own ratio would
    cost an extra forward pass. Only the first step pays for it. The checkpoint stores alpha.

    L_att: queries, keys and values as the projection gives them, before rotary embedding. The number of relation heads
    is the gcd of both models' kv_groups: the largest number that splits queries, keys and values of both models into
    whole heads; each is then on one tp rank.

    The teacher's states of a step are stored on the student's ranks, [seq, batch, hidden] per pair and micro-batch.
    The student's losses enter the backward pass at its states, so that only the pipeline stage of the states sees them.
    """

    def __init__(self, teacher: Model, student: Model, pairs: StatePairs, topology: Topology, *, seed: int = 0) -> None:
        """teacher, student: chunks of plain models, the student not yet wrapped for training. seed: of the linear map
        between hidden sizes, which `release` removes.

        Raises RecipeError for a pair that is not possible.
        """
        self.teacher, self.student, self.pairs, self.topology = chunks_of(teacher), chunks_of(student), pairs, topology
        teacher_shape, student_shape = shape_of(self.teacher[0]), shape_of(self.student[0])
        pairs.check(teacher_shape, student_shape, topology)
        self.heads = math.gcd(teacher_shape.kv_groups, student_shape.kv_groups)
        widths = student_shape.hidden, teacher_shape.hidden
        mapped = widths[0] != widths[1] and any(pair.kind != ATTENTION for pair in pairs.pairs)
        self.bridges = attach(self.student, widths if mapped else None, topology, seed)
        self._is_capturing = self._is_measuring = False
        self._index: int | None = None
        self._masks: list[Tensor] = []
        self._captured: dict[StateTap, list[Tensor]] = {StateTap(pair.kind, pair.teacher): [] for pair in pairs.pairs}
        self._to_recompute: dict[StateTap, deque[int]] = {
            StateTap(pair.kind, pair.student): deque() for pair in pairs.pairs
        }
        self._sums = torch.zeros(3, dtype=torch.float64, device=topology.device)
        self._handles = [
            *_hooked(self.teacher, self._captured, self._capture),
            *_hooked(self.student, self._to_recompute, self._compare),
        ]

    @property
    def alpha(self) -> float:
        """Weight of L_is in this step; NaN until the first step's states are measured."""
        return float(self.bridges[0].alpha) if self.pairs.dynamic else float(self.pairs.alpha)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture the teacher's states of each forward pass inside the context, in the order of micro-batches."""
        self._is_capturing = True
        try:
            yield
        finally:
            self._is_capturing = False

    def begin(self, batches: Sequence[Batch]) -> None:
        """Start a window of micro-batches. Call it before either model's first forward pass."""
        self._masks = [batch.mask.t() for batch in batches]
        for states in self._captured.values():
            states.clear()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the first step's alpha by the forward passes without gradients inside the context."""
        self._is_measuring = True
        try:
            yield
        finally:
            self._is_measuring = False
        self._settle()

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Context of the forward pass of a chunk of the student over micro-batch `index`."""
        self._index, self._weight = index, self._pair_weight()
        try:
            yield
        finally:
            self._index = None

    def add_logits(self, divergence: Tensor, tokens: Tensor) -> None:
        """Add the summed divergence of a micro-batch and its number of unmasked tokens. For the last stage."""
        if self.topology.tp_rank == 0:
            self._sums[0] += divergence.detach()
            self._sums[2] += tokens

    def finish(self) -> dict[str, float]:
        """Return the step's `states_loss` (per token) and `alpha`, and set the next step's alpha. Collective."""
        alpha = self.alpha
        values = {"states_loss": self._settle(), "alpha": alpha}
        for states in self._captured.values():
            states.clear()
        return values

    def release(self) -> None:
        """Remove the hooks from both models and the bridges from the student."""
        for handle in self._handles:
            handle.remove()
        detach(self.student)

    def _settle(self) -> float:
        """Return L_is since the last call, and set alpha from it if the ratio is finite. Collective."""
        logits, states, tokens = sum_over_world(self._sums.clone()).tolist()
        self._sums.zero_()
        ratio = logits / states if states > 0 else math.nan
        for bridge in self.bridges:
            if math.isfinite(ratio):
                bridge.alpha.fill_(ratio)
            elif bridge.alpha.isnan():
                bridge.alpha.zero_()
        return states / max(tokens, 1)

    def _pair_weight(self) -> Tensor:
        """Return the weight of one pair's summed loss in the backward pass."""
        alpha = self.bridges[0].alpha[0] if self.pairs.dynamic else torch.tensor(self.alpha)
        weight = alpha.to(self.topology.device, torch.float32) / len(self.pairs.pairs)
        scale = self.student[0].config.grad_scale_func
        return weight if scale is None else scale(weight)

    def _capture(self, tap: StateTap, module: nn.Module, inputs: object, output: ModuleOutput) -> None:
        """Forward hook on the teacher: store its states."""
        if self._is_capturing:
            self._captured[tap].append(_states(output).detach())

    def _compare(self, tap: StateTap, module: nn.Module, inputs: object, output: ModuleOutput) -> ModuleOutput | None:
        """Forward hook on the student: attach the losses of the pairs to its states.

        A recomputed layer runs twice: in the forward pass without gradients, then with gradients during the backward
        pass, in the order of micro-batches. The losses are attached in the second run.
        """
        index = self._index
        if index is None:
            if not (torch.is_grad_enabled() and self._to_recompute[tap]):
                return None
            index = self._to_recompute[tap].popleft()
        elif not torch.is_grad_enabled() and not self._is_measuring:
            self._to_recompute[tap].append(index)
            return None
        states = _states(output)
        for pair in self.pairs.pairs:
            if tap == (pair.kind, pair.student):
                teacher = self._captured[StateTap(pair.kind, pair.teacher)][index]
                loss = self._loss(pair, states, teacher, self._masks[index])
                states = attach_loss(states, loss, self._weight) if torch.is_grad_enabled() else states
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _loss(self, pair: LayerPair, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """Return this rank's part of the sum over tokens, and add it to L_is. counts: loss mask, [s, b]."""
        topology = self.topology
        if pair.kind == ATTENTION:
            loss, split = self._relations(student, teacher, counts), True
        else:
            split = topology.sequence_parallel
            counts = local_sequence(counts, topology.tp_group) if split else counts
            loss = state_loss(student, teacher, counts, self.pairs.loss, self.bridges[0])
        if split or topology.tp_rank == 0:
            self._sums[1] += loss.detach() / len(self.pairs.pairs)
        return loss

    def _relations(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """Return this rank's part of the mean over relation heads and over queries, keys and values."""
        local_heads, total = self.heads // self.topology.tp, student.new_zeros((), dtype=torch.float32)
        for role in RELATIONS:
            roles = self._role(student, self.student, role), self._role(teacher, self.teacher, role)
            total = total + relation_loss(*roles, counts, local_heads)
        return total / (self.heads * len(RELATIONS))

    def _role(self, qkv: Tensor, chunks: Sequence[Chunk], role: str) -> Tensor:
        """Return the queries, keys or values from this rank's QKV projection: [s, b, channels]."""
        shape = shape_of(chunks[0])
        sizes = shape.sizes() | {"kv_group": shape.kv_groups // self.topology.tp}
        return qkv.index_select(-1, lookup(QKV).role_rows(0, role, sizes).to(qkv.device))


def _states(output: ModuleOutput) -> Tensor:
    """Return the states in a module's output; mcore's linear layers return (output, bias)."""
    return output[0] if isinstance(output, tuple) else output


def _hooked(
    chunks: Sequence[Chunk], taps: Iterable[StateTap], hook: Callable[..., object]
) -> Iterator[RemovableHandle]:
    """Register `hook` on this rank's modules of the taps; yields the handles."""
    for chunk in chunks:
        for tap in taps:
            module = _module(chunk, tap)
            if module is not None:
                yield module.register_forward_hook(partial(hook, tap))


def _module(chunk: Chunk, tap: StateTap) -> nn.Module | None:
    """Return the module whose output a tap reads; None if it is in another chunk. Raises RecipeError for a fused
    norm."""
    shape = shape_of(chunk)
    if tap.kind == OUTPUTS and tap.layer == shape.layers - 1:
        return chunk.decoder.final_layernorm if chunk.post_process else None
    at = at_layer(tap.kind, tap.layer, shape)
    layer = next((each for each in chunk.decoder.layers if each.layer_number - 1 == at), None)
    if layer is None:
        return None
    if tap.kind == ATTENTION:
        return layer.self_attention.linear_qkv
    norm = layer.pre_mlp_layernorm if tap.kind == MLP_INPUTS else layer.input_layernorm
    if next(norm.parameters(), None) is None:
        raise RecipeError(
            f"the norm before layer {at} is fused into the linear layer after it, so its output cannot be read. "
            "Build the model with mcore's local layer spec."
        )
    return norm
