"""A judge of answers: a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated
from urllib.parse import urlsplit

from ...errors import DataError, RecipeError, first_line
from ...settings import AfterValidator, Count, HowToRun, Settings, Text, model_validator

__all__ = ["Judge", "judgments"]

ATTEMPTS = 6
PAUSE = 2.0
"""Seconds before the second attempt; each further pause is twice as long."""
LONGEST_PAUSE = 60.0
SECONDS = 120.0
"""Seconds to wait for a response."""
MOST_TOKENS = 2048
PASSING = (408, 409, 425, 429, *range(500, 600))
"""HTTP statuses after which the same request may succeed."""


def _check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        named = False
    if not named:
        raise ValueError("Give a URL that starts with http:// or https://, such as http://localhost:8000/v1")
    return url.rstrip("/")


class Judge(Settings):
    """A model that rates answers, behind an OpenAI-compatible endpoint (`/chat/completions`)."""

    url: Annotated[Text, AfterValidator(_check_url)]
    """Base URL of the endpoint, such as `https://api.openai.com/v1` or `http://localhost:8000/v1`."""
    model: Text
    """Name of the model at the endpoint. The papers use GPT-4-Turbo."""
    key_env: HowToRun[Text | None] = None
    """Name of the environment variable that holds the API key. Default: requests have no key."""
    concurrent: HowToRun[Count] = 8
    """Requests at a time."""

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Judge:
        """Refuse secrets, without showing them."""
        parts = urlsplit(self.url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("Give url without user, password, query and fragment; key_env names the variable of a key")
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.key_env, re.ASCII):
            raise ValueError("Give the name of an environment variable as key_env, such as OPENAI_API_KEY, not the key")
        return self

    def key(self) -> str | None:
        """Return the API key from the environment; None if `key_env` names none. Raises RecipeError if it is empty."""
        if self.key_env is None:
            return None
        if not (key := os.environ.get(self.key_env, "").strip()):
            raise RecipeError(
                f"the environment variable {self.key_env}, which `key_env` names, is not set. Export the judge's API "
                "key in it, or remove `key_env`."
            )
        if not re.fullmatch(r"[!-~]+", key):  # http.client's own message would show the key
            raise RecipeError(
                f"the environment variable {self.key_env}, which `key_env` names, holds spaces or other characters "
                "that no API key has. Export the key alone."
            )
        return key


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the API key on to whatever place a server names."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """Follow no redirect: the status becomes an error."""


def judgments(
    judge: Judge, conversations: Sequence[Sequence[dict[str, str]]]
) -> Generator[tuple[int, str], None, None]:
    """Yield (number of a conversation, the judge's response to it) as they arrive.

    After the responses that were under way, raises RecipeError if the judge refuses a request, DataError if it does not
    answer one in `ATTEMPTS` attempts.
    """
    key = judge.key()
    threads, ended = ThreadPoolExecutor(judge.concurrent), threading.Event()
    try:
        waiting = {
            threads.submit(_response, judge, key, each, ended): number for number, each in enumerate(conversations)
        }
        failed = None
        for future in as_completed(waiting):
            if not future.cancelled() and (error := future.exception()) is None:
                yield waiting[future], future.result()
            elif failed is None:
                failed = error
                ended.set()
                for other in waiting:
                    other.cancel()
        if failed is not None:
            raise failed
    finally:
        ended.set()
        threads.shutdown(wait=False, cancel_futures=True)


def _response(judge: Judge, key: str | None, messages: Sequence[dict[str, str]], ended: threading.Event) -> str:
    """Return the judge's response to one conversation, after as many attempts as it takes, or until `ended`."""
    body = {"model": judge.model, "messages": list(messages), "temperature": 0, "max_tokens": MOST_TOKENS}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{judge.url}/chat/completions", json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(_NoRedirects)
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt and ended.wait(min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)):
            break
        try:
            with opener.open(request, timeout=SECONDS) as response:
                return _content(response.read(), key)
        except urllib.error.HTTPError as error:
            with error:
                problem = _status(error, key)
            if error.code not in PASSING:
                raise RecipeError(
                    f"the judge at {judge.url} refuses a request: {problem}. Check `judge`, and its API key in the "
                    "environment."
                ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = first_line(error)
    raise DataError(
        f"the judge at {judge.url} gave no response in {ATTEMPTS} attempts: {problem}. Run the same command again when "
        "it works: its ratings so far are kept."
    )


def _content(body: bytes, key: str | None) -> str:
    """Return the text of a chat completion. Raises ValueError for anything else."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"its response is not a chat completion: {_shown(body, key)!r}") from error
    if not isinstance(content, str):
        raise ValueError("its response has no text")
    return content


def _status(error: urllib.error.HTTPError, key: str | None) -> str:
    """Return status, reason and the beginning of the body of an error."""
    try:
        body = _shown(error.read(), key)
    except (OSError, http.client.HTTPException):
        body = ""
    return f"{error.code} {error.reason}" + (f" ({body})" if body else "")


def _shown(body: bytes, key: str | None) -> str:
    """Return the beginning of a body in one line, without the API key should a server echo it."""
    text = " ".join(body.decode(errors="replace").split())
    return (text.replace(key, "***") if key else text)[:200]
