"""The refit again, naively: transformers' modules, hooks, whole activations, and float64 `lstsq`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.records import Plan
from minitron_megatron.refit import RIDGES

Seen = Mapping[tuple[str, int], Tensor]


def ridge_by_lstsq(x: Tensor, lacks: Tensor, ridge: float) -> Tensor:
    """argmin over D of |lacks - x D'|^2 + ridge mean(diag(x'x)) |D|^2, as one least-squares problem of more rows."""
    x, lacks = x.double(), lacks.double()
    strength = (ridge * x.square().sum(0).mean()).sqrt()
    if len(x) > 10**5:  # the logits of a vocabulary: a few unknowns, and `lstsq` takes seconds
        return torch.linalg.solve(x.T @ x + strength**2 * torch.eye(x.shape[1], dtype=torch.float64), x.T @ lacks).T
    more = torch.cat([x, strength * torch.eye(x.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(more, torch.cat([lacks, lacks.new_zeros(x.shape[1], lacks.shape[1])])).solution.T


class Naive:
    """A student of transformers, repaired in place on the counted positions of some samples."""

    def __init__(self, student: Any, teacher: Any, plan: Plan, tokens: Tensor, mask: Tensor, method: str) -> None:
        self.student, self.teacher, self.plan = student.model, teacher.model, plan
        self.tokens, self.method = tokens, method
        self.hidden = list(plan.kept_at("hidden", None))
        every = min(8, len(tokens))
        held = ((torch.arange(len(tokens)) + 1) % every == 0)[:, None].expand_as(mask)
        self.fitted, self.held = mask & ~held, mask & held
        with torch.no_grad():
            self.theirs = watch(self.teacher, tokens)
            for number, source in enumerate(plan.kept_layers):
                self.layer(number, source)
            if len(self.hidden) < plan.shape.hidden and not plan.shape.tied:
                head, aim = student.lm_head, teacher.lm_head
                self.match([head.weight], [aim.weight], self.ours()["norm", 0], self.theirs["norm", 0])
            elif len(self.hidden) < plan.shape.hidden:
                self.scale(self.student.norm, student.lm_head.weight, teacher.lm_head.weight)

    def ours(self) -> Seen:
        """States that pass the student; with `outputs` each layer is fed with the teacher's."""
        feeds = [self.theirs["in", source][..., self.hidden] for source in self.plan.kept_layers]
        feeds.append(self.theirs["end", 0][..., self.hidden])
        return watch(self.student, self.tokens, feeds if self.method == "outputs" else None)

    def layer(self, number: int, source: int) -> None:
        plan, mine, their = self.plan, self.student.layers[number], self.teacher.layers[source]
        narrow = len(self.hidden) < plan.shape.hidden
        heads, ffn = plan.kept_at("heads", source), list(plan.kept_at("ffn", source))
        rows = [head * plan.shape.head_dim + channel for head in heads for channel in range(plan.shape.head_dim)]
        if narrow:
            attention, of = mine.self_attn, their.self_attn
            weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            targets = [of.q_proj.weight[rows], of.k_proj.weight, of.v_proj.weight]
            self.match(weights, targets, self.ours()["qkv", number], self.theirs["qkv", source])
        seen, aim = self.ours(), self.theirs["middle", source][..., self.hidden]
        self.fit([mine.self_attn.o_proj.weight], seen["o", number], aim - seen["middle", number])
        if plan.shape.experts:
            self.mixture(number, source, narrow)
            return
        if narrow:
            weights, targets = [mine.mlp.up_proj.weight], [their.mlp.up_proj.weight[ffn]]
            if hasattr(mine.mlp, "gate_proj"):
                weights, targets = [mine.mlp.gate_proj.weight, *weights], [their.mlp.gate_proj.weight[ffn], *targets]
            self.match(weights, targets, self.ours()["mlp", number], self.theirs["mlp", source])
        following = [*plan.kept_layers, plan.shape.layers][number + 1] if self.method == "sequential" else source + 1
        at = ("end", 0) if following == plan.shape.layers else ("in", following)
        seen = self.ours()
        after = ("end", 0) if number + 1 == len(plan.kept_layers) and self.method == "sequential" else ("out", number)
        lacks = self.theirs[at][..., self.hidden] - seen[after]
        self.fit([mine.mlp.down_proj.weight], seen["down", number], lacks)

    def mixture(self, number: int, source: int, narrow: bool) -> None:
        plan, mine, their = self.plan, self.student.layers[number].mlp, self.teacher.layers[source].mlp
        kept = list(plan.kept_at("experts", source))
        x, y = self.ours()["mlp", number], self.theirs["mlp", source]
        if narrow:
            self.match([mine.gate.weight], [their.gate.weight[kept]], x, y)
        _, weight, chosen = mine.gate(x)
        routing = torch.zeros(len(x.flatten(0, 1)), len(kept)).scatter_(1, chosen, weight).unflatten(0, x.shape[:2])
        size, cut = plan.shape.expert_ffn, plan.target.expert_ffn

        def run(states: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            gate, up = F.linear(states, first).chunk(2, -1)
            return F.silu(gate) * up, F.linear(F.silu(gate) * up, second)

        for expert, of in enumerate(kept):
            neurons = [unit - of * size for unit in plan.kept_at("expert_ffn", source) if unit // size == of]
            assert len(neurons) == cut
            sent = routing[..., expert] > 0
            first, second = mine.experts.gate_up_proj.data[expert], mine.experts.down_proj.data[expert]
            target = their.experts.gate_up_proj[of]
            if narrow:
                self.match([first], [target[[*neurons, *(size + unit for unit in neurons)]]], x, y, sent)
            active, out = run(x, first, second)
            aim = run(y, target, their.experts.down_proj[of])[1][..., self.hidden]
            share = routing[..., expert, None]
            self.fit([second], share * active, share * (aim - out), sent)

    def scale(self, norm: Any, head: Tensor, aim: Tensor) -> None:
        """Fit a factor for each channel that enters a tied output layer: the logits of all tokens are the equations."""
        x, y = self.ours()["norm", 0], self.theirs["norm", 0]
        lacks, before = F.linear(y, aim) - F.linear(x, head), norm.weight.clone()
        spread = (x[:, :, None] * head)[self.fitted | self.held].flatten(0, 1)
        counted = (self.fitted | self.held).flatten()
        kinds = [mask.flatten()[counted].repeat_interleave(len(head)) for mask in (self.fitted, self.held)]
        rows = lacks[self.fitted | self.held].flatten()[:, None]
        factor = torch.ones(1, x.shape[-1])
        self.fitted, self.held = kinds
        self.fit([factor], spread, rows)
        norm.weight.copy_(before * factor[0])

    def match(
        self, weights: Sequence[Tensor], targets: Sequence[Tensor], x: Tensor, y: Tensor, sent: Tensor | None = None
    ) -> None:
        """Fit layers of one input x to targets' outputs on y."""
        lacks = F.linear(y.double(), torch.cat(list(targets)).double())
        self.fit(weights, x, lacks - F.linear(x.double(), torch.cat(list(weights)).double()), sent)

    def fit(self, weights: Sequence[Tensor], x: Tensor, lacks: Tensor, sent: Tensor | None = None) -> None:
        fitted, held = (each if sent is None else each & sent for each in (self.fitted, self.held))
        least, best = lacks[held].double().square().sum(), None
        for ridge in RIDGES:
            step = ridge_by_lstsq(x[fitted], lacks[fitted], ridge)
            error = (lacks[held].double() - F.linear(x[held].double(), step)).square().sum()
            if error < least:
                least, best = error, step
        if best is not None:
            for weight, step in zip(weights, best.split([len(each) for each in weights]), strict=True):
                weight.copy_(weight.double() + step)


def watch(model: Any, tokens: Tensor, feeds: Sequence[Tensor] | None = None) -> Seen:
    """States that pass a transformers decoder; feeds: those that enter each layer and the final norm instead."""
    seen: dict[tuple[str, int], Tensor] = {}
    with ExitStack() as hooks:

        def before(module: Any, name: str, number: int, feed: Tensor | None = None) -> None:
            def hook(_: Any, args: tuple[Any, ...]) -> Any:
                seen[name, number] = args[0] if feed is None else feed
                return None if feed is None else (feed, *args[1:])

            hooks.callback(module.register_forward_pre_hook(hook).remove)

        for number, layer in enumerate(model.layers):
            before(layer, "in", number, feeds[number] if feeds else None)
            before(layer.self_attn.q_proj, "qkv", number)
            before(layer.self_attn.o_proj, "o", number)
            before(layer.post_attention_layernorm, "middle", number)
            before(layer.mlp, "mlp", number)
            if hasattr(layer.mlp, "down_proj"):
                before(layer.mlp.down_proj, "down", number)
            layer_out = layer.register_forward_hook(
                lambda _, args, out, number=number: seen.update({("out", number): out})
            )
            hooks.callback(layer_out.remove)
        before(model.norm, "end", 0, feeds[-1] if feeds else None)
        model(tokens)
        seen["norm", 0] = model.norm(seen["end", 0])
    return seen
