"""A judge behind an endpoint, played by a local server: retries, refusals, ratings that cannot be read, and its key."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import DataError, RecipeError
from minitron_megatron.evaluate import Judge
from minitron_megatron.evaluate.chat import judge as module
from minitron_megatron.evaluate.chat.judge import judgments
from minitron_megatron.evaluate.chat.mt_bench import MT_BENCH
from minitron_megatron.evaluate.chat.task import Answered, Graded
from minitron_megatron.events import silent
from tests.evaluate.chat_files import mt_bench

KEY = "secret-key"
OK = "I think so. Rating: [[7]]"
Response = tuple[int, bytes]


def said(text: str) -> Response:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Stub(ThreadingHTTPServer):
    """A server with a list of responses, then always `OK`. It records requests and how many it serves at once."""

    def __init__(self, responses: Sequence[Response] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.responses, self.requests, self.keys = deque(responses), list[dict[str, Any]](), list[str | None]()
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    @property
    def judge(self) -> Judge:
        return Judge(f"http://127.0.0.1:{self.server_port}/v1/", "gpt", "JUDGE_KEY", 2)


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        stub = self.server
        with stub.lock:
            stub.now += 1
            stub.most = max(stub.most, stub.now)
            assert self.path == "/v1/chat/completions"
            stub.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            stub.keys.append(self.headers["Authorization"])
            status, body = stub.responses.popleft() if stub.responses else said(OK)
        threading.Event().wait(0.02)
        with stub.lock:
            stub.now -= 1
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "/v1/chat/completions")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "PAUSE", 0.001)
    with Stub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(stub: Stub, count: int = 1) -> list[str]:
    conversations = [[{"role": "user", "content": f"rate {number}"}] for number in range(count)]
    return [text for _, text in sorted(judgments(stub.judge, conversations))]


def test_requests_have_the_form_of_the_api_and_are_few_at_a_time(stub: Stub) -> None:
    assert ask(stub, 6) == [OK] * 6 and stub.most == 2
    assert {json.dumps(request["messages"]) for request in stub.requests} == {
        json.dumps([{"role": "user", "content": f"rate {number}"}]) for number in range(6)
    }
    assert stub.requests[0]["model"] == "gpt" and stub.requests[0]["temperature"] == 0
    assert set(stub.keys) == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "first", [(500, b"busy"), (429, b""), (200, b"{not json"), (200, b'{"choices": []}'), (200, b'"text"')]
)
def test_what_may_pass_is_tried_again(stub: Stub, first: Response) -> None:
    stub.responses.extend([first, first])
    assert ask(stub) == [OK] and len(stub.requests) == 3


@pytest.mark.parametrize(
    ("response", "says"),
    [
        ((401, b'{"error": "bad key secret-key"}'), r"401 Unauthorized .*bad key \*\*\*"),
        ((400, b"." * 195 + KEY.encode()), r"400 Bad Request \(\.+\*\*\*\)"),
        ((404, b""), "404 Not Found"),
        ((307, b""), "307"),
    ],
)
def test_what_cannot_pass_is_one_message_without_the_key(stub: Stub, response: Response, says: str) -> None:
    stub.responses.append(response)
    with pytest.raises(
        RecipeError, match=rf"refuses a request: {says}.*\. Check `judge`, and its API key in the env"
    ) as found:
        ask(stub)
    assert len(stub.requests) == 1 and KEY not in str(found.value)


def test_a_response_without_text_is_one_message(stub: Stub) -> None:
    stub.responses.extend([(200, b'{"choices": [{"message": {"content": null}}]}')] * module.ATTEMPTS)
    with pytest.raises(DataError) as found:
        ask(stub)
    assert str(found.value) == (
        f"the judge at {stub.judge.url} gave no response in 6 attempts: its response has no text. Run the same command "
        "again when it works: its ratings so far are kept."
    )


def test_a_judge_that_stays_broken_or_away_is_one_message(stub: Stub) -> None:
    stub.responses.extend([(200, b"<html>")] * module.ATTEMPTS)
    with pytest.raises(DataError, match=r"no response in 6 attempts: its response is not a chat completion: '<html>'"):
        ask(stub)
    stub.server_close()
    with pytest.raises(DataError, match=r"no response in 6 attempts: .*refused"):
        ask(stub)


def test_settings_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("localhost:8000/v1", "ftp://host", "http://", "http://host:x/v1"):
        with pytest.raises(RecipeError, match=r"url is .*give a URL that starts with http"):
            Judge(url, "gpt")
    for secret in ({"url": "http://me:secret@host/v1"}, {"url": "http://host/v1?key=secret"}, {"key_env": "sk-secret"}):
        with pytest.raises(RecipeError, match="Give") as found:
            Judge(**{"url": "http://host/v1", "model": "gpt"} | secret)
        assert "secret" not in str(found.value)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(RecipeError, match="JUDGE_KEY, which `key_env` names, is not set"):
        Judge("http://host/v1", "gpt", "JUDGE_KEY").key()
    monkeypatch.setenv("JUDGE_KEY", "secret\nkey")
    with pytest.raises(
        RecipeError, match=r"which `key_env` names, holds spaces or other characters that no API key has\. Export"
    ) as found:
        Judge("http://host/v1", "gpt", "JUDGE_KEY").key()
    assert "secret" not in str(found.value)
    assert Judge("http://host/v1", "gpt").key() is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mt_bench(tmp_path)
    return tmp_path / "mt_bench"


def graded(stub: Stub, folder: Path) -> Graded:
    answered = [Answered(question, ("one", "two")) for question in MT_BENCH.questions(folder)]
    return MT_BENCH.grade(answered, folder, stub.judge, folder / "answers.jsonl", silent)


def test_both_turns_are_rated_with_references_where_they_are_needed(stub: Stub, folder: Path) -> None:
    found = graded(stub, folder)
    assert found.metrics == {"rating": 7.0, "turn_1": 7.0, "turn_2": 7.0} and not found.notes
    prompts = {request["messages"][1]["content"] for request in stub.requests}
    assert prompts == {
        "plain Write 0. | one",
        "plain two: Write 0. | one | Again 0. | two",
        "math Write 1. | r1 | one",
        "math two: Write 1. | r1 | one | Again 1. | r2 | two",
    }
    assert all(request["messages"][0] == {"role": "system", "content": "You rate."} for request in stub.requests)


@pytest.mark.parametrize(
    ("text", "rating"),
    [("[[7.5]] of [[10]]", 7.5), ("Rating: [3]", 3.0), ("10 points", None), ("[[11]]", None), ("[[0]]", None)],
)
def test_a_rating_is_read(stub: Stub, folder: Path, text: str, rating: float | None) -> None:
    """A response without a rating is left out of the mean, and counted."""
    stub.responses.extend([said(text)])
    found = graded(stub, folder)
    ratings = [each for line in found.lines for each in line["ratings"]]  # type: ignore[attr-defined]
    assert sorted(map(str, ratings)) == sorted(map(str, [rating, 7.0, 7.0, 7.0]))
    assert found.metrics["rating"] == pytest.approx(7.0 if rating is None else (21 + rating) / 4)
    assert list(found.notes) == (
        ["mt_bench: 1 of 4 responses of the judge hold no rating, and are left out of the mean."] * (rating is None)
    )


def test_no_rating_at_all_is_an_error(stub: Stub, folder: Path) -> None:
    stub.responses.extend([said("Fine.")] * 4)
    with pytest.raises(
        DataError, match=r"no response of the judge gpt holds a rating .*'Fine\.'\. Name another model as"
    ):
        graded(stub, folder)


def test_a_judge_that_fails_keeps_answers_and_ratings(stub: Stub, folder: Path) -> None:
    """The answers are in the form of FastChat's `model_answer`. What is judged already is not asked for again."""
    stub.responses.extend([said(OK), (403, b"quota")])
    with pytest.raises(RecipeError, match="403 Forbidden"):
        graded(stub, folder)
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 111]
    assert [line["choices"] for line in lines] == [[{"index": 0, "turns": ["one", "two"]}]] * 2
    kept = sum(each is not None for line in lines for each in line["judgments"])
    assert kept >= 1 and KEY not in (folder / "answers.jsonl").read_text()
    before = len(stub.requests)
    assert graded(stub, folder).metrics["rating"] == 7.0 and len(stub.requests) == before + 4 - kept


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("judge_prompts.jsonl", None, r"has no judge_prompts\.jsonl\. Copy it from FastChat"),
        ("judge_prompts.jsonl", '{"name": "other", "system_prompt": "", "prompt_template": ""}', "has no single-v1"),
        (
            "judge_prompts.jsonl",
            "".join(
                json.dumps({"name": name, "system_prompt": "", "prompt_template": "{hint}"}) + "\n"
                for name in ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
            ),
            r"judge_prompts\.jsonl: single-v1 has the field hint, which MT-Bench lacks\. Copy it from FastChat",
        ),
        ("reference_answer/gpt-4.jsonl", None, r"has no reference_answer/gpt-4\.jsonl"),
        (
            "reference_answer/gpt-4.jsonl",
            '{"question_id": 81, "choices": []}',
            "question 111 of MT-Bench has no reference .* Copy ref",
        ),
        (
            "question.jsonl",
            '{"question_id": 1, "category": "math", "turns": ["a"]}',
            "question 1 does not have two turns",
        ),
    ],
)
def test_files_that_a_judge_needs_are_known_before(folder: Path, file: str, text: str | None, says: str) -> None:
    MT_BENCH.check_judge(folder)
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(DataError, match=says):
        MT_BENCH.check_judge(folder)
