"""Chat templates: conversations become text, of which the parts that the assistant wrote are known.

A template is a program by a stranger. transformers runs it in jinja's sandbox; whatever it raises is one message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from ..errors import DataError, first_line
from .chat import Conversation, Message
from .tokenizer import transformers_tokenizer

__all__ = ["ChatError", "ChatTemplate", "chat_marks", "load_template"]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Marker by which a template says what the assistant writes."""
TODAY = "strftime_now"
"""Function by which a template writes the date."""

Spans = list[tuple[int, int]]
"""First character of each part of a text, and the one after its last."""


class ChatError(Exception):
    """A conversation cannot be rendered. Arguments: what is wrong, and what to do."""


@dataclass(frozen=True)
class ChatTemplate:
    """Chat template of a tokenizer."""

    plain: str
    with_tools: str
    """Template for conversations with tools; the plain one where a tokenizer has only one."""
    special: Mapping[str, str]
    """Names of special tokens, such as `bos_token`, and their texts."""

    @property
    def marks(self) -> list[object]:
        """Everything that determines the text of a conversation, but the date."""
        return [self.plain, self.with_tools, dict(self.special)]

    @property
    def day(self) -> str:
        """Today's date where the template writes it, else empty."""
        return str(date.today()) if TODAY in self.plain + self.with_tools else ""

    def turns(self, conversation: Conversation) -> tuple[str, Spans]:
        """Return the text of a conversation, and what the assistant wrote of it.

        The template's generation markers say it. Where it has none, it is what an assistant message adds to the text
        of the messages before it, generation prompt included. Raises ChatError where there is no such text, or where
        the text of fewer messages is not the beginning of that of more.
        """
        messages = conversation["messages"]
        if not any(message["role"] == "assistant" for message in messages):
            raise ChatError("it has no assistant turn", "Remove it, or set loss_on to all.")
        if GENERATION.search(self._source(conversation)):
            text, spans = self._render(conversation, messages, marked=True)
        else:
            text = self.text(conversation)
            spans = self._differences(conversation, text)
        if not any(start < end for start, end in spans):
            raise ChatError(
                "the chat template writes nothing for the assistant's turns",
                "Correct the template, or set loss_on to all.",
            )
        return text, spans

    def text(self, conversation: Conversation) -> str:
        """Return the text of a conversation."""
        return self._render(conversation, conversation["messages"])[0]

    def prompt(self, conversation: Conversation) -> str:
        """Return the text of a conversation up to where the assistant's next turn begins."""
        return self._render(conversation, conversation["messages"], prompt=True)[0]

    def _differences(self, conversation: Conversation, text: str) -> Spans:
        messages, spans = conversation["messages"], list[tuple[int, int]]()
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self._render(conversation, messages[:number], prompt=True)
                after, _ = self._render(conversation, messages[: number + 1])
                if not (after.startswith(before) and text.startswith(after)):
                    raise ChatError(
                        f"the chat template writes the assistant's turn messages[{number}] in another way when more "
                        "messages follow, so that it cannot be told apart",
                        "Mark what the assistant writes by {% generation %} in the template, or set loss_on to all.",
                    )
                spans.append((len(before), len(after)))
        return spans

    def _source(self, conversation: Conversation) -> str:
        return self.with_tools if conversation.get("tools") else self.plain

    def _render(
        self, conversation: Conversation, messages: Sequence[Message], *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, Spans]:
        """Return the text of some messages and, if `marked`, what the template marks as the assistant's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            [text], spans = render_jinja_template(
                conversations=[list(messages)],
                tools=conversation.get("tools"),
                chat_template=self._source(conversation),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self.special,
            )
        except Exception as error:  # jinja's errors, and those of the template's own operations on values
            raise ChatError(
                f"the chat template cannot be applied: {first_line(error)}", "Correct the record, or the template."
            ) from error
        return text, list(spans[0]) if marked else []


def load_template(folder: str | Path) -> ChatTemplate:
    """Return the chat template of a Hugging Face folder. Raises DataError where there is none."""
    tokenizer = transformers_tokenizer(folder)
    try:
        plain, with_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
    except ValueError as error:
        raise DataError(
            f"The tokenizer in {folder} has no chat template, which a source of the format chat needs. Put the "
            "model's chat_template.jinja there, or set chat_template in tokenizer_config.json."
        ) from error
    return ChatTemplate(plain, with_tools, {name: str(text) for name, text in tokenizer.special_tokens_map.items()})


def chat_marks(folder: str | Path) -> list[object]:
    """Return everything but the tokenizer that determines the tokens of a chat. Raises DataError without a template."""
    return load_template(folder).marks
