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
from ..model import chunks_of, config_of, forward_only, output_weight, reads_past
from ..parallel import Topology, gather_objects, gather_sequence
from .generate import IncrementalDecoder, Texts, padded

__all__ = ["Predictor", "RunBatches"]

Tokens = tuple[int, ...]
Likelihood = tuple[float, bool]
"""log p in nats, and whether greedy decoding would give just this."""
RunBatches = Callable[[Sequence[Batch]], list[Tensor]]
"""The final hidden states of micro-batches, on the last pipeline stage."""
Adjust = Callable[[Sequence[int], int, Tensor], Tensor]
"""(tokens so far, how many of them are new, logits [vocab]) -> logits."""


class Predictor:
    """A model in evaluation. Its methods are collective over the world and give every rank all answers.

    Data-parallel ranks share the work, longest first; what pads a batch comes after what counts and changes nothing.
    """

    def __init__(self, model: Any, topology: Topology, *, micro_batch: int = 8, run: RunBatches | None = None) -> None:
        """run: in the place of `forward_only` of the model."""
        self._run = run or partial(forward_only, model)
        self.model, self.topology, self.micro_batch = chunks_of(model), topology, micro_batch
        self.config = config_of(self.model[0])
        self._keeps = run is None and all(reads_past(chunk) for chunk in self.model)
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
        adjust: Adjust | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        listener: Listener = silent,
    ) -> list[list[int]]:
        """At most `most` tokens after each prompt, until `stop` of what was made. temperature 0: the likeliest.

        adjust: changes the logits first. top_k: sample among so many; 0: among all. What is sampled depends on the seed
        and the prompt's number alone. Each token is one step of a model whose attention is ours, for keys and values
        are kept; of another, or with a `run` of its own, a pass over all before.
        """
        made: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda at: (-len(prompts[at]), at))
        rounds = list(self._rounds(len(order)))
        for done, places in enumerate(rounds, 1):
            mine = [None if place is None else order[place] for place in places]
            texts = [[0] if at is None else list(prompts[at]) for at in mine]
            read, going = self._reader(texts, most), {at for at in mine if at is not None}
            for step in range(most):
                states = {at: hidden for column, hidden in read(texts).items() if (at := mine[column]) in going}
                logits = self._logits(states, texts, mine, step, adjust) if adjust or temperature else None
                if logits is None or not states:
                    chosen = self._likeliest(states)
                elif temperature == 0:
                    chosen = dict(zip(states, logits.argmax(-1).tolist(), strict=True))
                else:
                    chosen = _sampled(states, logits / temperature, top_k, top_p, (seed, step))
                everyone = {at: token for part in gather_objects(chosen) for at, token in part.items()}
                for at, token in everyone.items():
                    made[at].append(token)
                going = {at for at in everyone if not stop(made[at])}
                if not going:
                    break
                for text, at in zip(texts, mine, strict=True):
                    if at in going:
                        text.append(made[at][-1])
            listener(Event("generate", done, len(rounds), "batches"))
        return made

    def _reader(self, texts: Texts, most: int) -> Callable[[Texts], Mapping[int, Tensor]]:
        """Text -> the final state [h] of its last token, however it grows; last pipeline stage only."""
        if self._keeps:
            return IncrementalDecoder(self._run, self.topology, texts, most, self.micro_batch)

        def all_again(texts: Texts) -> dict[int, Tensor]:
            found = self._last_states(range(len(texts)), [(tuple(text), 1) for text in texts])
            return {at: hidden[0] for at, hidden in found}

        return all_again

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
        tokens = padded([span[0] if span else () for span in spans], self.topology)
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

    def _likeliest(self, states: Mapping[int, Tensor]) -> dict[int, int]:
        """Prompt -> the likeliest token after its state [h]."""
        if not states:
            return {}
        hidden = torch.stack(list(states.values()))
        none = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return dict(zip(states, self._likelihood(hidden, none)[2].tolist(), strict=True))

    def _logits(
        self, states: Mapping[int, Tensor], texts: Texts, mine: Sequence[int | None], new: int, adjust: Adjust | None
    ) -> Tensor | None:
        """[states, vocab] on every tensor-parallel rank, after `adjust`. texts: what each of `mine` has so far."""
        if not states:
            return None
        hidden = torch.stack(list(states.values()))
        logits = (hidden @ output_weight(self.model[-1]).t()).float().t()
        whole = gather_sequence(logits, self.topology.tp_group).t()[:, : self.config.shape.vocab]
        if adjust is None:
            return whole
        so_far = {at: text for at, text in zip(mine, texts, strict=True) if at is not None}
        return torch.stack([adjust(so_far[at], new, row) for at, row in zip(states, whole, strict=True)])

    def _together(self, mine: Mapping[int, Likelihood], count: int) -> list[Likelihood]:
        every: dict[int, Likelihood] = {}
        for part in gather_objects(dict(mine)):
            every |= part
        return [every[number] for number in range(count)]


def _sampled(
    states: Mapping[int, Tensor], logits: Tensor, top_k: int, top_p: float, seed: tuple[int, int]
) -> dict[int, int]:
    """Prompt -> a token drawn from its row of logits, by the seed and the prompt's number."""
    chances, tokens = logits.softmax(-1).sort(descending=True)
    if top_k:
        chances[:, top_k:] = 0
        chances /= chances.sum(-1, keepdim=True)
    chances[chances.cumsum(-1) - chances >= top_p] = 0
    chosen = {}
    for at, row, of_row in zip(states, chances, tokens, strict=True):
        generator = torch.Generator(logits.device).manual_seed(hash((*seed, at)) % 2**63)
        chosen[at] = int(of_row[torch.multinomial(row, 1, generator=generator)])
    return chosen
