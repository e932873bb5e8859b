"""Predictions of a model at any layout: likelihoods of given continuations, and generated continuations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..data import Batch
from ..errors import expect_number
from ..events import Event, Listener, silent
from ..losses import token_likelihood
from ..model import Model, chunks_of, field_of, forward_only, output_weight, reads_past
from ..parallel import Topology, gather_objects, gather_sequence
from .generate import IncrementalDecoder, Texts, padded

__all__ = ["Predictor", "RunBatches", "Sampling"]

Tokens = tuple[int, ...]
Likelihood = tuple[float, bool]
"""(log p in nats, whether greedy decoding would give exactly this continuation)."""
RunBatches = Callable[[Sequence[Batch]], list[Tensor]]
"""Micro-batches -> their final hidden states, on the last pipeline stage."""
Adjust = Callable[[Sequence[int], int, Tensor], Tensor]
"""(tokens so far, number of new ones, logits [vocab]) -> logits."""


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token from logits. Samples depend only on the seed and the prompt's number or key."""

    temperature: float = 0.0
    """0 is greedy decoding."""
    top_k: int = 0
    """Sample among so many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Nucleus sampling: sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    keys: Sequence[tuple[int, ...]] | None = None
    """Name of each prompt in the random choices; None: its number."""

    def __post_init__(self) -> None:
        """Raise RecipeError for a value out of range; greedy decoding does not use `top_k` and `top_p`."""
        expect_number("temperature", self.temperature, at_least=0)
        if self.temperature:
            expect_number("top_k", self.top_k, at_least=0, whole=True)
            expect_number("top_p", self.top_p, above=0, at_most=1)

    def choose(self, prompts: Iterable[int], logits: Tensor, step: int) -> dict[int, int]:
        """Return prompt -> token, from a row of logits each: [prompts, vocab]."""
        if self.temperature == 0:
            return dict(zip(prompts, logits.argmax(-1).tolist(), strict=True))
        probabilities, tokens = (logits / self.temperature).softmax(-1).sort(descending=True)
        if self.top_k:
            probabilities[:, self.top_k :] = 0
            probabilities /= probabilities.sum(-1, keepdim=True)
        probabilities[probabilities.cumsum(-1) - probabilities >= self.top_p] = 0
        # back into the vocabulary's order: rounding decides the order of tokens that are about as likely
        by_token = torch.empty_like(probabilities).scatter_(-1, tokens, probabilities)
        chosen = {}
        for at, row in zip(prompts, by_token, strict=True):
            key = at if self.keys is None else self.keys[at]
            generator = torch.Generator(logits.device).manual_seed(hash((self.seed, step, key)) % 2**63)
            chosen[at] = int(torch.multinomial(row, 1, generator=generator))
        return chosen


class Predictor:
    """A model in eval mode. Its methods are collective over the world, and every rank gets all results.

    Data-parallel ranks share the inputs, longest first. Padding follows the real tokens and changes no result.
    """

    def __init__(
        self, model: Model, topology: Topology, *, micro_batch: int = 8, run: RunBatches | None = None
    ) -> None:
        """model: in eval mode, as `evaluating` has it. run: replaces `forward_only` of the model."""
        self._run: RunBatches = run or partial(forward_only, model)
        self.model, self.topology, self.micro_batch = chunks_of(model), topology, micro_batch
        self.vocab, self.positions = (field_of(self.model[0], field) for field in ("vocab", "max_positions"))
        self._uses_cache = run is None and all(reads_past(chunk) for chunk in self.model)

    @torch.no_grad()
    def likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, listener: Listener = silent
    ) -> list[Likelihood]:
        """Return the likelihood of each (context, continuation), neither empty.

        Pairs that differ only in their last token share one pass.
        """
        last: dict[Tokens, list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            last.setdefault((*context, *continuation)[:-1], []).append(number)
        inputs = sorted(last, key=lambda tokens: (-len(tokens), tokens))
        lengths = [max(len(pairs[number][1]) for number in last[tokens]) for tokens in inputs]
        local: dict[int, Likelihood] = {}
        rounds = list(self._rounds(len(inputs)))
        for done, places in enumerate(rounds, 1):
            spans = [(inputs[at], lengths[at]) if at is not None else None for at in places]
            states = [(n, hidden) for at, hidden in self._last_states(places, spans) for n in last[inputs[at]]]
            local |= self._likelihoods([(n, hidden, pairs[n][1]) for n, hidden in states])
            listener(Event("tasks", done, len(rounds), "batches"))
        return self._gather_all(local, len(pairs))

    @torch.no_grad()
    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        most: int,
        *,
        stop: Callable[[Sequence[int]], bool] = lambda made: False,
        adjust: Adjust | None = None,
        sampling: Sampling | None = None,
        listener: Listener = silent,
    ) -> list[list[int]]:
        """Generate at most `most` tokens after each prompt, until `stop(tokens made so far)`.

        adjust: changes the logits first. sampling: None is greedy decoding. With our own attention a KV cache makes
        each token one step; other attention, or a custom `run`, reads the whole text again for each token.
        """
        made: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda at: (-len(prompts[at]), at))
        rounds = list(self._rounds(len(order)))
        for done, places in enumerate(rounds, 1):
            local = [None if place is None else order[place] for place in places]
            texts = [[0] if at is None else list(prompts[at]) for at in local]
            read, unfinished = self._reader(texts, most), {at for at in local if at is not None}
            for step in range(most):
                states = {at: hidden for column, hidden in read(texts).items() if (at := local[column]) in unfinished}
                chosen = self._chosen(states, texts, local, step, adjust, sampling or Sampling())
                everyone = {at: token for part in gather_objects(chosen) for at, token in part.items()}
                for at, token in everyone.items():
                    made[at].append(token)
                unfinished = {at for at in everyone if not stop(made[at])}
                if not unfinished:
                    break
                for text, at in zip(texts, local, strict=True):
                    if at in unfinished:
                        text.append(made[at][-1])
            listener(Event("generate", done, len(rounds), "batches"))
        return made

    def _chosen(
        self,
        states: Mapping[int, Tensor],
        texts: Texts,
        prompts: Sequence[int | None],
        new: int,
        adjust: Adjust | None,
        sampling: Sampling,
    ) -> dict[int, int]:
        """Return prompt -> its next token. new: tokens made so far."""
        logits = self._logits(states, texts, prompts, new, adjust) if adjust or sampling.temperature else None
        if logits is None or not states:
            return self._likeliest(states)
        return sampling.choose(states, logits, new)

    def _reader(self, texts: Texts, most: int) -> Callable[[Texts], Mapping[int, Tensor]]:
        """Return a function (growing texts) -> final state [h] of each text's last token; last pipeline stage only."""
        if self._uses_cache:
            return IncrementalDecoder(partial(forward_only, self.model), self.topology, texts, most, self.micro_batch)

        def read_all(texts: Texts) -> dict[int, Tensor]:
            found = self._last_states(range(len(texts)), [(tuple(text), 1) for text in texts])
            return {at: hidden[0] for at, hidden in found}

        return read_all

    def _rounds(self, count: int) -> Iterator[list[int | None]]:
        """Yield this rank's places among `count` inputs, one pipeline fill at a time; None pads to equal work."""
        window = self.micro_batch * self.topology.pp
        for start in range(0, count, window * self.topology.dp):
            at = start + self.topology.dp_rank * window
            yield [place if place < count else None for place in range(at, at + window)]

    def _last_states(
        self, places: Sequence[int | None], spans: Sequence[tuple[Tokens, int] | None]
    ) -> list[tuple[int, Tensor]]:
        """Return (place, final states [n, h] of its last n tokens) of each span (tokens, n); last stage only."""
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

    def _likelihoods(self, requests: Sequence[tuple[int, Tensor, Sequence[int]]]) -> dict[int, Likelihood]:
        """Return number -> likelihood, from (number, states [n, h], continuation).

        The last len(continuation) states predict the continuation's tokens; earlier ones are ignored.
        """
        if not requests:
            return {}
        lengths = [len(continuation) for *_, continuation in requests]
        states = torch.cat([hidden[-length:] for (_, hidden, _), length in zip(requests, lengths, strict=True)])
        labels = torch.tensor([token for *_, continuation in requests for token in continuation], device=states.device)
        found, greedy, _ = self._likelihood(states, labels)
        parts = zip(requests, found.cpu().split(lengths), greedy.cpu().split(lengths), strict=True)
        return {number: (float(each.sum()), bool(best.all())) for (number, *_), each, best in parts}

    def _likelihood(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, vocab = output_weight(self.model[-1]), self.vocab
        return token_likelihood(hidden, weight, labels, vocab=vocab, group=self.topology.tp_group)

    def _likeliest(self, states: Mapping[int, Tensor]) -> dict[int, int]:
        """Return prompt -> the likeliest token after its state [h]."""
        if not states:
            return {}
        hidden = torch.stack(list(states.values()))
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # ignored
        return dict(zip(states, self._likelihood(hidden, labels)[2].tolist(), strict=True))

    def _logits(
        self, states: Mapping[int, Tensor], texts: Texts, prompts: Sequence[int | None], new: int, adjust: Adjust | None
    ) -> Tensor | None:
        """Return adjusted logits [states, vocab] on every tp rank. texts: tokens so far of each of `prompts`."""
        if not states:
            return None
        hidden = torch.stack(list(states.values()))
        logits = (hidden @ output_weight(self.model[-1]).t()).float().t()
        whole = gather_sequence(logits, self.topology.tp_group).t()[:, : self.vocab]
        if adjust is None:
            return whole
        so_far = {at: text for at, text in zip(prompts, texts, strict=True) if at is not None}
        return torch.stack([adjust(so_far[at], new, row) for at, row in zip(states, whole, strict=True)])

    def _gather_all(self, local: Mapping[int, Likelihood], count: int) -> list[Likelihood]:
        every: dict[int, Likelihood] = {}
        for part in gather_objects(dict(local)):
            every |= part
        return [every[number] for number in range(count)]
