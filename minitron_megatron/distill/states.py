"""Hidden states of the student made like the teacher's, at every layout."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import Batch
from ..errors import RecipeError
from ..layout import lookup
from ..losses import attach_loss, relation_loss, state_loss
from ..model import chunks_of, config_of
from ..parallel import Topology, local_sequence, sum_over_world
from .bridge import attach, detach
from .pairs import ATTENTION, MLP_INPUTS, OUTPUTS, LayerPair, StatePairs, at_layer

__all__ = ["StateLoss"]

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
RELATIONS = ("q", "k", "v")


class StateTap(NamedTuple):
    """Where a state is measured: what leaves a module. The embedding is the output of layer -1."""

    kind: str
    layer: int


class StateLoss:
    """alpha * L_is, L_is the mean over the pairs of a loss a token, beside the divergence of the logits (section 3).

    `dynamic`: alpha = L_logits / L_is, both means over the tokens of a global batch, a constant of the step, as the
    paper has it, but of the step before: backward passes begin before the last forward pass ends, so that a step's own
    ratio would cost a forward pass more. Being of the global batch it depends on no layout and no micro-batch. The
    first step measures its own. The checkpoint holds it.

    L_att: queries, keys and values as the projection gives them, before rotation. There are gcd of both models'
    kv_groups relation heads: the most that are whole heads of both in all three, and then whole on a rank of tp too.

    The teacher's states of a step lie on the student's ranks: [seq, batch, hidden] a pair and micro-batch. The
    student's losses enter the backward pass where its states are, so that no stage but theirs knows of them.
    """

    def __init__(self, teacher: Any, student: Any, pairs: StatePairs, topology: Topology, *, seed: int = 0) -> None:
        """teacher, student: chunks of plain models, the student not yet wrapped for training. seed: of the map between
        widths, which `release` drops.

        Raises RecipeError where a pair cannot be.
        """
        self.teacher, self.student, self.pairs, self.topology = chunks_of(teacher), chunks_of(student), pairs, topology
        theirs, ours = config_of(self.teacher[0]).shape, config_of(self.student[0]).shape
        pairs.check(theirs, ours, topology)
        self.heads = math.gcd(theirs.kv_groups, ours.kv_groups)
        maps = theirs.hidden != ours.hidden and any(pair.kind != ATTENTION for pair in pairs.pairs)
        self.bridges = attach(self.student, (ours.hidden, theirs.hidden) if maps else None, topology, seed)
        self._listening = self._measuring = False
        self._at: int | None = None
        self._masks: list[Tensor] = []
        self._seen: dict[StateTap, list[Tensor]] = {StateTap(pair.kind, pair.teacher): [] for pair in pairs.pairs}
        self._again: dict[StateTap, deque[int]] = {StateTap(pair.kind, pair.student): deque() for pair in pairs.pairs}
        self._sums = torch.zeros(3, dtype=torch.float64, device=topology.device)
        hooks = [(self.teacher, self._seen, self._hear), (self.student, self._again, self._compare)]
        self._handles = [each for chunks, taps, hook in hooks for each in _hooked(chunks, taps, hook)]

    @property
    def alpha(self) -> float:
        """Weight of L_is in this step; not a number before the first one's states are measured."""
        return float(self.bridges[0].alpha) if self.pairs.dynamic else float(self.pairs.alpha)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside, what the teacher runs leaves its states, a micro-batch after the other."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def begin(self, batches: Sequence[Batch]) -> None:
        """Before the first micro-batch of a window, of either model."""
        self._masks = [batch.mask.t() for batch in batches]
        for states in self._seen.values():
            states.clear()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, forward passes without gradients measure the first step's alpha."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
        self._settle()

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Around the forward pass of a chunk of the student over micro-batch `index`."""
        self._at, self._weight = index, self._weight_of_pair()
        try:
            yield
        finally:
            self._at = None

    def add_logits(self, divergence: Tensor, tokens: Tensor) -> None:
        """The summed divergence of a micro-batch and its counted tokens, from the last stage."""
        if self.topology.tp_rank == 0:
            self._sums[0] += divergence.detach()
            self._sums[2] += tokens

    def finish(self) -> dict[str, float]:
        """What a step measured: `states_loss` a token, and its `alpha`. Sets the next step's. Collective."""
        alpha = self.alpha
        values = {"states_loss": self._settle(), "alpha": alpha}
        for states in self._seen.values():
            states.clear()
        return values

    def release(self) -> None:
        """Takes from both models what was put on them; the map between widths goes."""
        for handle in self._handles:
            handle.remove()
        detach(self.student)

    def _settle(self) -> float:
        """L_is of what was measured since the last time; alpha follows where both are numbers. Collective."""
        logits, states, tokens = sum_over_world(self._sums.clone()).tolist()
        self._sums.zero_()
        ratio = logits / states if states > 0 else math.nan
        for bridge in self.bridges:
            if math.isfinite(ratio):
                bridge.alpha.fill_(ratio)
            elif bridge.alpha.isnan():
                bridge.alpha.zero_()
        return states / max(tokens, 1)

    def _weight_of_pair(self) -> Tensor:
        """Of one pair's summed loss in the backward pass."""
        alpha = self.bridges[0].alpha[0] if self.pairs.dynamic else torch.tensor(self.alpha)
        weight = alpha.to(self.topology.device, torch.float32) / len(self.pairs.pairs)
        scale = self.student[0].config.grad_scale_func
        return weight if scale is None else scale(weight)

    def _hear(self, tap: StateTap, module: Any, inputs: Any, output: Any) -> None:
        if self._listening:
            self._seen[tap].append(_states(output).detach())

    def _compare(self, tap: StateTap, module: Any, inputs: Any, output: Any) -> Any:
        """A hook on the student: its states, with the losses of the pairs that they are in.

        A layer that is recomputed runs without gradients first, and again, in the order of micro-batches, when its turn
        in the backward pass has come.
        """
        index = self._at
        if index is None:
            if not (torch.is_grad_enabled() and self._again[tap]):
                return None
            index = self._again[tap].popleft()
        elif not torch.is_grad_enabled() and not self._measuring:
            self._again[tap].append(index)
            return None
        states = _states(output)
        for pair in self.pairs.pairs:
            if tap == (pair.kind, pair.student):
                loss = self._loss(
                    pair, states, self._seen[StateTap(pair.kind, pair.teacher)][index], self._masks[index]
                )
                states = attach_loss(states, loss, self._weight) if torch.is_grad_enabled() else states
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _loss(self, pair: LayerPair, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """This rank's part of the sum over tokens; it is added to L_is. counts: [s, b]."""
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
        """The mean over relation heads, of all ranks, and over queries, keys and values."""
        here, total = self.heads // self.topology.tp, student.new_zeros((), dtype=torch.float32)
        for role in RELATIONS:
            ours, theirs = self._role(student, self.student, role), self._role(teacher, self.teacher, role)
            total = total + relation_loss(ours, theirs, counts, here)
        return total / (self.heads * len(RELATIONS))

    def _role(self, qkv: Tensor, chunks: Sequence[Any], role: str) -> Tensor:
        """The queries, keys or values of what this rank's projection gave: [s, b, channels]."""
        shape = config_of(chunks[0]).shape
        sizes = shape.sizes() | {"kv_group": shape.kv_groups // self.topology.tp}
        return qkv.index_select(-1, lookup(QKV).role_rows(0, role, sizes).to(qkv.device))


def _states(output: Any) -> Tensor:
    """A linear layer of mcore gives its bias beside."""
    return output[0] if isinstance(output, tuple) else output


def _hooked(chunks: Sequence[Any], taps: Any, hook: Callable[..., Any]) -> Iterator[Any]:
    """Puts `hook` on what this rank has of the taps; handles."""
    for chunk in chunks:
        for tap in taps:
            module = _module(chunk, tap)
            if module is not None:
                yield module.register_forward_hook(partial(hook, tap))


def _module(chunk: Any, tap: StateTap) -> Any | None:
    """The module that a tap's states leave; None where another chunk has it. Raises RecipeError where no norm does."""
    shape = config_of(chunk).shape
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
            f"the norm before layer {at} is fused with what follows it, so that no state is seen. "
            "Build the model with mcore's local layer spec."
        )
    return norm
