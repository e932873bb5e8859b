"""lm-evaluation-harness over a model at any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DataError
from ..events import Listener, silent
from .predict import Predictor

__all__ = ["harness_model"]

MOST_TOKENS = 256
"""Generated where a task does not say, as in the harness's own models."""

Pair = tuple[list[int], list[int]]


def harness_model(
    predictor: Predictor, tokenizer: Any, *, truncate: bool = False, seed: int = 0, listener: Listener = silent
) -> Any:
    """An `lm_eval` model that gives the numbers of its own Hugging Face one. Collective, as `predictor` is.

    tokenizer: of transformers. truncate: drop the beginning of what is longer than the context; else it is a DataError.
    """
    from lm_eval.api.model import TemplateLM

    made: Any = type("MegatronLM", (_Answers, TemplateLM), {})()
    made.predictor, made.tokenizer, made.truncate, made.seed, made.listener = (
        predictor,
        tokenizer,
        truncate,
        seed,
        listener,
    )
    return made


class _Answers:
    """What the harness asks of a model. Every rank runs the harness and hands its requests to all of them together."""

    predictor: Predictor
    tokenizer: Any
    truncate: bool
    seed: int
    listener: Listener

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def context(self) -> int:
        return self.predictor.config.max_positions

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [_fitted(before, after, self.context, self.truncate) for _, before, after in requests]
        return self.predictor.likelihoods(pairs, listener=self.listener)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.context, context_len=1)
            windows += [make_disjoint_window(part) for part in parts]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (found, _) in zip(owners, self.predictor.likelihoods(windows, listener=self.listener), strict=True):
            totals[owner] += found
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            texts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._generated(texts, requests[numbers[0]].args[1]), strict=True):
                answers[number] = text
        return answers

    def _generated(self, texts: Sequence[str], how: Any) -> list[str]:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        options = normalize_gen_kwargs(how, MOST_TOKENS)
        ends = handle_stop_sequences(options["until"], eos=self.tokenizer.decode(self.eot_token_id))
        most = options["max_gen_toks"]
        made = self.predictor.continuations(
            [_cut(self.tok_encode(text), self.context - most, self.truncate) for text in texts],
            most,
            stop=_stopper(self.tokenizer, ends, self.eot_token_id),
            temperature=float(options.get("temperature", 0.0)),
            top_p=float(options.get("top_p", 1.0)),
            seed=self.seed,
            listener=self.listener,
        )
        return [_until(self.tokenizer.decode(tokens, skip_special_tokens=True), ends) for tokens in made]


def _fitted(before: list[int], after: list[int], context: int, truncate: bool) -> Pair:
    """A pair whose input, without the last token, fits the context."""
    if len(after) > context:
        raise DataError(f"a continuation of {len(after)} tokens is longer than the model's context of {context}.")
    return _cut(before, context + 1 - len(after), truncate), after


def _cut(tokens: list[int], most: int, truncate: bool) -> list[int]:
    if len(tokens) > most and not truncate:
        raise DataError(
            f"a prompt of {len(tokens)} tokens is longer than the {max(most, 0)} that the model's context leaves it. "
            "Ask for fewer shots, or set evaluate.truncate to drop the beginnings of prompts."
        )
    if most < 1:
        raise DataError(
            "the model's context leaves no room for prompts beside what the task generates. "
            "Leave the task out, or raise max_position_embeddings where the model bears it."
        )
    return tokens[-most:]


def _stopper(tokenizer: Any, ends: Sequence[str], eos: int) -> Callable[[Sequence[int]], bool]:
    def stop(made: Sequence[int]) -> bool:
        text = tokenizer.decode(made, skip_special_tokens=True)
        return made[-1] == eos or any(end in text for end in ends if end)

    return stop


def _until(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0] if end else text
    return text
