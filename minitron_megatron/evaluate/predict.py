"""What a model at any layout says of token lists of any length: likelihoods of continuations, and continuations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import Batch
from ..events import Event, Listener, silent
from ..losses import token_likelihood
from ..model import chunks_of, config_of, forward_only, output_weight
from ..parallel import Topology, gather_objects, gather_sequence

__all__ = ["Predictor", "Run"]

Tokens = tuple[int, ...]
Likelihood = tuple[float, bool]
"""log p in nats, and whether greedy decoding would give just this."""
Run = Callable[[Sequence[Batch]], list[Tensor]]
"""The final hidden states of micro-batches, on the last pipeline stage."""


class Predictor:
    """A model in evaluation. Its methods are collective over the world and give every rank all answers.

    Data-parallel ranks share the work, longest first; what pads a batch comes after what counts and changes nothing.
    """

    def __init__(self, model: Any, topology: Topology, *, micro_batch: int = 8, run: Run | None = None) -> None:
        """run: in the place of `forward_only` of the model."""
        self._run = run or partial(forward_only, model)
        self.model, self.topology, self.micro_batch = chunks_of(model), topology, micro_batch
        self.config = config_of(self.model[0])
        for chunk in self.model:
            chunk.eval()

    @torch.no_grad()
    def likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, listener: Listener = silent
    ) -> list[Likelihood]:
        """Of each (context, continuation), neither empty. Pairs that differ in their last token alone are one pass."""
        last: dict[Tokens, list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            last.setdefault((*context, *continuation)[:-1], []).append(number)
        inputs = sorted(last, key=lambda tokens: (-len(tokens), tokens))
        lengths = [max(len(pairs[number][1]) for number in last[tokens]) for tokens in inputs]
        mine: dict[int, Likelihood] = {}
        rounds = list(self._rounds(len(inputs)))
        for done, places in enumerate(rounds, 1):
            spans = [(inputs[at], lengths[at]) if at is not None else None for at in places]
            asked = [(n, hidden) for at, hidden in self._last_states(places, spans) for n in last[inputs[at]]]
            mine |= self._likelihoods([(n, hidden, pairs[n][1]) for n, hidden in asked])
            listener(Event("tasks", done, len(rounds), "batches"))
        return self._together(mine, len(pairs))

    @torch.no_grad()
    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        most: int,
        *,
        stop: Callable[[Sequence[int]], bool] = lambda made: False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        listener: Listener = silent,
    ) -> list[list[int]]:
        """At most `most` tokens after each prompt, until `stop` of what was made. temperature 0: the likeliest.

        Every token costs a pass over all before it, for nothing is cached: for a few hundred tokens and no more.
        """
        made: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for step in range(most):
            order = sorted(going, key=lambda at: (-len(prompts[at]), at))
            mine: dict[int, int] = {}
            for places in self._rounds(len(order)):
                spans = [((*prompts[order[at]], *made[order[at]]), 1) if at is not None else None for at in places]
                for at, hidden in self._last_states(places, spans):
                    mine[order[at]] = self._next(hidden, temperature, top_p, hash((seed, order[at], step)))
            for part in gather_objects(mine):
                for at, token in part.items():
                    if at in going and len(made[at]) == step:
                        made[at].append(token)
            going = {at for at in going if not stop(made[at])}
            listener(Event("generate", step + 1, most, "tokens"))
            if not going:
                break
        return made

    def _rounds(self, count: int) -> Iterator[list[int | None]]:
        """This rank's places of `count`, a pipeline's fill at a time; None: nothing, so that all ranks do as much."""
        window = self.micro_batch * self.topology.pp
        for start in range(0, count, window * self.topology.dp):
            at = start + self.topology.dp_rank * window
            yield [place if place < count else None for place in range(at, at + window)]

    def _last_states(
        self, places: Sequence[int | None], spans: Sequence[tuple[Tokens, int] | None]
    ) -> list[tuple[int, Tensor]]:
        """(place, final states [n, h] of the last so many tokens) of each span (tokens, how many); last stage only."""
        longest = max((len(span[0]) for span in spans if span), default=1)
        if self.topology.ep > 1:  # ranks that share experts exchange tokens: as many each
            longest = max(gather_objects(longest))
        longest += -longest % (self.topology.tp if self.topology.sequence_parallel else 1)
        tokens = torch.zeros(len(spans), longest, dtype=torch.int64)
        for row, span in zip(tokens, spans, strict=True):
            if span:
                row[: len(span[0])] = torch.tensor(span[0])
        batches = [
            Batch(part, part, torch.ones_like(part, dtype=torch.bool)).to(self.topology.device)
            for part in tokens.split(self.micro_batch)
        ]
        found = []
        for number, hidden in enumerate(self._run(batches)):
            if self.topology.sequence_parallel:
                hidden = gather_sequence(hidden, self.topology.tp_group)
            for column in range(hidden.shape[1]):
                at, span = places[number * self.micro_batch + column], spans[number * self.micro_batch + column]
                if at is not None and span:
                    end = len(span[0])
                    found.append((at, hidden[end - span[1] : end, column]))
        return found

    def _likelihoods(self, asked: Sequence[tuple[int, Tensor, Sequence[int]]]) -> dict[int, Likelihood]:
        """Number -> likelihood of the continuation after the states [n, h] that foretell it and perhaps others more."""
        if not asked:
            return {}
        lengths = [len(continuation) for *_, continuation in asked]
        states = torch.cat([hidden[-length:] for (_, hidden, _), length in zip(asked, lengths, strict=True)])
        labels = torch.tensor([token for *_, continuation in asked for token in continuation], device=states.device)
        found, greedy, _ = self._likelihood(states, labels)
        parts = zip(asked, found.cpu().split(lengths), greedy.cpu().split(lengths), strict=True)
        return {number: (float(each.sum()), bool(best.all())) for (number, *_), each, best in parts}

    def _likelihood(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, vocab = output_weight(self.model[-1]), self.config.shape.vocab
        return token_likelihood(hidden, weight, labels, vocab=vocab, group=self.topology.tp_group)

    def _next(self, hidden: Tensor, temperature: float, top_p: float, seed: int) -> int:
        """The token after the last of these states."""
        if temperature == 0:
            return int(self._likelihood(hidden, torch.zeros(1, dtype=torch.int64, device=hidden.device))[2])
        vocab = self.config.shape.vocab
        logits = (hidden @ output_weight(self.model[-1]).t()).float().t().contiguous()
        whole = gather_sequence(logits, self.topology.tp_group).flatten()[:vocab] / temperature
        chances, tokens = whole.softmax(-1).sort(descending=True)
        chances[chances.cumsum(-1) - chances >= top_p] = 0
        generator = torch.Generator(hidden.device).manual_seed(seed % 2**63)
        return int(tokens[torch.multinomial(chances, 1, generator=generator)])

    def _together(self, mine: Mapping[int, Likelihood], count: int) -> list[Likelihood]:
        every: dict[int, Likelihood] = {}
        for part in gather_objects(dict(mine)):
            every |= part
        return [every[number] for number in range(count)]
