"""Records of chats: conversations, pairs of prompt and response, and preference pairs, checked and in one form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

from ..errors import DataError, did_you_mean
from ..wrong_values import kind_of
from .document import Document, Fields, document_of, listed

__all__ = [
    "CHAT_KEYS",
    "REWARD_KEYS",
    "ROLES",
    "Conversation",
    "Message",
    "Preference",
    "Prompt",
    "Rated",
    "record_document",
]

ROLES = ("system", "developer", "user", "assistant", "tool")
RESPONSES = ("response", "completion")
REWARD_KEYS = ("chosen_reward", "rejected_reward")
CHAT_KEYS = ("messages", "tools", "prompt", *RESPONSES, "chosen", "rejected", *REWARD_KEYS)
"""Keys of a record that are read; other ones are ignored."""

Message = dict[str, object]
"""`role`, one of `ROLES`, `content`, text, and whatever else the chat template may use, such as `tool_calls`."""
Tool = dict[str, object]
"""JSON schema of a function."""


class Conversation(TypedDict):
    messages: list[Message]
    tools: NotRequired[list[Tool]]
    """JSON schemas of the tools that the assistant may call."""


class Preference(TypedDict):
    """Two responses to one prompt."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: NotRequired[list[Tool]]
    rewards: NotRequired[tuple[float, float]]
    """Rewards of the chosen and the rejected response."""


class Prompt(TypedDict):
    """Messages that the assistant is to answer. The record's further keys, such as `answer`, stay beside these."""

    prompt: list[Message]
    tools: NotRequired[list[Tool]]


class Rated(Prompt):
    """A prompt with responses to it, and the reward of each."""

    responses: list[Message]
    rewards: list[float]


def record_document(record: object, fields: Fields, size: int, place: str) -> Document:
    """Return the document in a record, as `fields.form` says; chats as the JSON of the form's TypedDict.

    Raises DataError, which names the place, for a record of another form.
    """
    if fields.form == "text":
        return document_of(record, fields.text_key, size, place)
    if not isinstance(record, dict):
        raise DataError(f"{place} is not a chat: it holds {kind_of(record)}. Each record must be an object.")
    found = FORMS[fields.form](record, place)
    try:
        return Document(json.dumps(found, ensure_ascii=False), size, place)
    except TypeError as error:  # of a table: bytes, dates and decimals
        raise DataError(f"{place} holds a value that JSON does not have: {error}. Correct it, or remove it.") from error


def _conversation(record: dict[str, object], place: str) -> Conversation:
    """Return a conversation: that under `messages`, or a prompt with its response."""
    if "messages" in record:
        messages = _messages(record["messages"], "messages", place)
    elif "prompt" in record and (key := next((key for key in RESPONSES if key in record), None)):
        messages = [*_prompt(record["prompt"], place), *_response(record[key], key, place)]
    else:
        raise DataError(
            f"{place} holds {listed(record, 'key')}, and a chat has messages, or prompt and response. "
            "Rename its keys, or set the format of the source to text."
        )
    return Conversation(messages=messages) | _tools(record, place)


def _preference(record: dict[str, object], place: str) -> Preference:
    """Return a preference pair: `prompt`, `chosen` and `rejected`, or two conversations that differ in their end."""
    if missing := [key for key in ("chosen", "rejected") if key not in record]:
        raise DataError(f"{place} has no {missing[0]}; it holds {listed(record, 'key')}. A pair needs both.")
    chosen, rejected = (_response(record[key], key, place) for key in ("chosen", "rejected"))
    prompt = _prompt(record["prompt"], place) if record.get("prompt") is not None else []
    if len(chosen) > 1 or not prompt:
        prompt = chosen[:-1]
        chosen, rejected = _without(prompt, chosen), _without(prompt, rejected)
    if not prompt or len(chosen) != 1 or len(rejected) != 1:
        raise DataError(
            f"{place} is not a preference pair: chosen and rejected must each be one response to the same prompt. "
            "Correct it, or remove it."
        )
    if chosen == rejected:
        raise DataError(f"{place} has the same response as chosen and as rejected. Remove it.")
    pair = Preference(prompt=prompt, chosen=chosen[0], rejected=rejected[0])
    return pair | _tools(record, place) | _rewards(record, place)


def _without(prompt: list[Message], conversation: list[Message]) -> list[Message]:
    """Return what follows a prompt; nothing where the conversation does not begin with it."""
    return conversation[len(prompt) :] if conversation[: len(prompt)] == prompt else []


def _rewards(record: dict[str, object], place: str) -> Any:
    given = [record.get(key) for key in REWARD_KEYS]
    if given == [None, None]:
        return {}
    if not all(map(_is_finite, given)):
        raise DataError(f"{place} needs numbers as {' and '.join(REWARD_KEYS)}, or neither of them.")
    return {"rewards": tuple(map(float, given))}  # type: ignore[arg-type]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _open_prompt(record: dict[str, object], place: str) -> Prompt:
    """Return a record whose `prompt`, or else `messages`, awaits the assistant's answer."""
    key = next((key for key in ("prompt", "messages") if key in record), None)
    if key is None:
        raise DataError(f"{place} holds {listed(record, 'key')}, and a prompt has prompt or messages. Rename its keys.")
    messages = _prompt(record[key], place) if key == "prompt" else _messages(record[key], key, place)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{place} ends with an assistant turn, so nothing is left to answer. Remove that turn.")
    others = {name: value for name, value in record.items() if name != "tools"}
    return Prompt(**others | {"prompt": messages} | _tools(record, place))  # type: ignore[typeddict-item]


def _rated(record: dict[str, object], place: str) -> Rated:
    """Return a prompt with its `responses`, each text or messages, and their `rewards`."""
    responses, rewards = record.get("responses", []), record.get("rewards", [])
    if (
        not isinstance(responses, list)
        or not isinstance(rewards, list)
        or not responses
        or len(responses) != len(rewards)
    ):
        raise DataError(
            f"{place} needs two lists of one length, responses and rewards; it holds {listed(record, 'key')}. "
            "Correct it, or remove it."
        )
    if not all(map(_is_finite, rewards)):
        raise DataError(f"{place} has rewards that are not all finite numbers. Correct it, or remove it.")
    turns = [_response(each, f"responses[{number}]", place) for number, each in enumerate(responses)]
    if any(len(turn) != 1 for turn in turns):
        raise DataError(f"{place} has a response of several messages. Put what comes before the last into the prompt.")
    rated = {"responses": [turn[0] for turn in turns], "rewards": list(map(float, rewards))}
    return Rated(**{**_open_prompt(record, place), **rated})  # type: ignore[typeddict-item]


FORMS: dict[str, Callable[[dict[str, object], str], Conversation | Preference | Prompt]] = {
    "chat": _conversation,
    "preference": _preference,
    "prompt": _open_prompt,
    "rated": _rated,
}


def _prompt(value: object, place: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return _messages(value, "prompt", place)


def _response(value: object, key: str, place: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = _messages([value] if isinstance(value, dict) else value, key, place)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{place} has a {key} that does not end with an assistant turn. Correct it, or remove it.")
    return messages


def _messages(value: object, key: str, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        held = "an empty list" if value == [] else kind_of(value)
        raise DataError(f"{place} has no list of messages under the key {key!r}: its value is {held}. Correct it.")
    return [_message(each, f"{place}, {key}[{number}]") for number, each in enumerate(value)]


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{place} is {kind_of(value)}. Each message must be an object with role and content.")
    if "role" not in value:
        raise DataError(f"{place} holds {listed(value, 'key')}, and a message has role and content. Rename its keys.")
    role, content = value["role"], value.get("content")
    if role not in ROLES:
        told = repr(role[:40]) if isinstance(role, str) else kind_of(role)
        raise DataError(
            f"{place} has the role {told}, and the roles are {', '.join(ROLES)}.{did_you_mean(str(role), ROLES)} "
            "Rename it."
        )
    message = {name: held for name, held in value.items() if held is not None}  # templates would print None
    if content is None and message.get("tool_calls"):
        return message
    return message | {"content": _text(content, place)}


def _text(content: object, place: str) -> str:
    """Return the text of a content, the parts of a list joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{place} has no text as content; its value is {kind_of(content)}. Correct it, or remove it.")
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else None
            told = f"of type {kind!r}" if isinstance(kind, str) and kind != "text" else kind_of(part)
            raise DataError(f"{place} has content that is not text: part {number} is {told}. Remove the record.")
        texts.append(text)
    return "".join(texts)


def _tools(record: dict[str, object], place: str) -> Any:
    """Return the tools of a record, if any, under their key."""
    tools = record.get("tools")
    if tools is None or tools == []:
        return {}
    if not isinstance(tools, list):
        raise DataError(f"{place} has tools that are not a list of JSON schemas, but {kind_of(tools)}. Correct it.")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise DataError(f"{place}, tools[{number}] is {kind_of(tool)}, and not a JSON schema. Correct it.")
    return {"tools": tools}
