"""Adapter that lets lm-evaluation-harness evaluate a model at any parallel layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import DataError, first_line
from ..events import Listener, silent
from .decoding import Decoding, TransformersTokenizer, decoding, stopper
from .generate import MOST_TOKENS
from .predict import Predictor, Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = ["HarnessMethods", "harness_model"]

log = logging.getLogger("lm_eval")
"""The harness's logger; its warnings reach the user."""

ContextAndAnswer = tuple[list[int], list[int]]


def harness_model(
    tokenizer: TransformersTokenizer,
    *,
    end: int,
    context: int,
    vocab: int,
    settings: Mapping[str, object],
    predictor: Predictor | None = None,
    truncate: bool = False,
    seed: int = 0,
    listener: Listener = silent,
) -> HarnessMethods:
    """Return an `lm_eval` model with the same results as the harness's Hugging Face model. Collective like `predictor`.

    tokenizer: of transformers. end: id that ends a document. context, vocab: the model's numbers of positions and of
    embeddings. settings: generation settings, as in generation_config.json. predictor: None to check prompts only.
    truncate: drop the beginning of inputs longer than the context; otherwise they raise DataError.
    """
    from lm_eval.api.model import TemplateLM

    made = type("MegatronLM", (HarnessMethods, TemplateLM), {})()
    made.tokenizer, made.eot_token_id, made.context, made.vocab, made.settings = (
        tokenizer,
        end,
        context,
        vocab,
        settings,
    )
    made.predictor, made.truncate, made.seed, made.listener = predictor, truncate, seed, listener
    return made


class HarnessMethods:
    """Methods that the harness calls on a model. Every rank runs the harness with the same requests."""

    predictor: Predictor
    tokenizer: TransformersTokenizer
    eot_token_id: int = 0
    context: int
    vocab: int
    settings: Mapping[str, object]
    truncate: bool
    seed: int
    listener: Listener

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        from jinja2.exceptions import TemplateError

        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))
        except TemplateError:
            log.warning("Failed to apply chat template. removing the system role in chat history.")
        others = [message for message in chat_history if message["role"] != "system"]
        try:
            return str(self.tokenizer.apply_chat_template(others, tokenize=False, **options))
        except TemplateError as error:
            raise DataError(
                f"the tokenizer's chat template fails on a prompt: {str(error)[:200].rstrip('.')}. "
                "Leave out `chat` or this task."
            ) from error

    def conversation(self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()) -> str:
        """Return a conversation as a server puts it to the model, up to where the assistant's next turn begins.

        tools: JSON schemas of functions. Raises DataError where the template refuses the conversation.
        """
        options = {"tools": list(tools)} if tools else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
            )
        except Exception as error:  # a template raises anything
            raise DataError(
                f"the tokenizer's chat template fails on a conversation: {first_line(error)[:200]}. "
                "Leave out this task, or correct the template."
            ) from error

    def check_conversations(self, prompts: Sequence[str], kwargs: Mapping[str, object]) -> None:
        """Raise DataError if the model cannot answer texts of `conversation`, as `replies` does."""
        self._prompts(prompts, self._rules(kwargs)[2], special=False)

    def replies(self, prompts: Sequence[str], kwargs: Mapping[str, object]) -> list[str]:
        """Return the answers to texts of `conversation`, which hold all special tokens. Collective over the world.

        kwargs: `generation_kwargs` as of a task.
        """
        return self._generated(prompts, kwargs, special=False)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        if (
            add_special_tokens is None
            and isinstance(string, str)
            and string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ):
            add_special_tokens = False
        return self._encoded(string, add_special_tokens)

    def _encoded(self, string: str, add_special_tokens: bool | None) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if not isinstance(string, str):
            raise DataError(f"a prompt or an answer is {string!r}, not a string. Correct the task's data.")
        tokens = list(self.tokenizer.encode(string, **options))
        if tokens and (most := max(tokens)) >= self.vocab:
            raise DataError(
                f"a prompt holds the token {self.tokenizer.decode([most])!r}, whose id is {most}, but the model has "
                f"{self.vocab} embeddings. Use the tokenizer that came with the model."
            )
        return tokens

    def check_settings(self, kwargs: Mapping[str, object]) -> None:
        """Raise DataError if a task's `generation_kwargs` are not supported or leave no room for a prompt."""
        _cut([0], self.context - self._rules(kwargs)[2], True)

    def checked(self, requests: Sequence[Instance]) -> None:
        """Raise DataError if the model cannot run these requests."""
        for request in requests:
            if request.request_type == "loglikelihood":
                self._pairs([request])
            elif request.request_type == "generate_until":
                self._prompts([request.args[0]], self._rules(request.args[1])[2])

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._loglikelihood_tokens([(None, *pair) for pair in self._pairs(requests)])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        return self.predictor.likelihoods([(before, after) for _, before, after in requests], listener=self.listener)

    def _pairs(self, requests: Sequence[Instance]) -> list[ContextAndAnswer]:
        """Return the tokens of each (context, continuation), split as in `TemplateLM`."""
        pairs = []
        for context, continuation in (request.args[:2] for request in requests):
            if not isinstance(continuation, str):
                raise DataError(f"an answer is {continuation!r}, not a string. Correct the task's data.")
            if context == "":
                after = self.tok_encode(continuation, add_special_tokens=False)
                before = [self.prefix_token_id]
                if after[:1] == before:
                    before, after = after[:1], after[1:]
            else:
                before, after = self._encode_pair(context, continuation)  # type: ignore[attr-defined]
            if not before or not after:
                raise DataError(
                    f"the answer {continuation[:80]!r} adds no tokens after {context[-80:]!r}. "
                    "Correct or leave out this question."
                )
            pairs.append(self._fitted(before, after))
        return pairs

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[ContextAndAnswer] = []
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

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        answers = [""] * len(requests)
        for numbers in by_settings.values():
            texts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._generated(texts, requests[numbers[0]].args[1]), strict=True):
                answers[number] = text
        return answers

    def _rules(self, kwargs: Mapping[str, object]) -> tuple[Decoding, list[str], int]:
        """Return (decoding rules, stop strings, largest number of tokens of an answer)."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        options = normalize_gen_kwargs(kwargs, MOST_TOKENS)
        rules = decoding(self.settings, options, self.tokenizer.name_or_path)
        ends = handle_stop_sequences(options["until"], eos=self.tokenizer.decode(self.eot_token_id))
        return rules, ends, options["max_gen_toks"]

    def _prompts(self, texts: Sequence[str], most: int, special: bool | None = None) -> list[list[int]]:
        """Return the tokens of prompts, cut to leave room for an answer of `most` tokens.

        special: add special tokens; None: as the tokenizer does, unless the text begins with one.
        """
        first = self.tokenizer.bos_token
        found = [self._encoded(text, False if first and text.startswith(first) else special) for text in texts]
        if not all(found):
            raise DataError("a prompt has no tokens, so nothing can be generated after it. Leave out its question.")
        return [_cut(tokens, self.context - most, self.truncate) for tokens in found]

    def _generated(self, texts: Sequence[str], kwargs: Mapping[str, object], special: bool | None = None) -> list[str]:
        rules, ends, most = self._rules(kwargs)
        prompts = self._prompts(texts, most, special)
        if rules.most is not None:
            most = min(rules.most, self.context - max(map(len, prompts)))
        made = self.predictor.continuations(
            prompts,
            most,
            stop=stopper(self.tokenizer, ends, rules.ends),
            adjust=rules.adjust,
            sampling=Sampling(rules.temperature, rules.top_k, rules.top_p, self.seed),
            listener=self.listener,
        )
        return [_until(self.tokenizer.decode(tokens, skip_special_tokens=True), ends) for tokens in made]

    def _fitted(self, before: list[int], after: list[int]) -> ContextAndAnswer:
        """Cut the context so that the pair without its last token fits the model."""
        if len(after) > self.context:
            raise DataError(
                f"a continuation of {len(after)} tokens is longer than the model's context of {self.context}. Leave "
                "the task out, or remove the question."
            )
        return _cut(before, self.context + 1 - len(after), self.truncate), after


def _cut(tokens: list[int], most: int, truncate: bool) -> list[int]:
    if most < 1:
        raise DataError(
            "the model's context leaves no room for prompts besides the tokens that the task generates. "
            "Leave the task out, or raise max_position_embeddings if the model supports it."
        )
    if len(tokens) > most and not truncate:
        raise DataError(
            f"a prompt of {len(tokens)} tokens is longer than the {most} that fit the model's context. "
            "Use fewer shots, or set `truncate` to drop the beginnings of prompts."
        )
    return tokens[-most:]


def _until(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0] if end else text
    return text
