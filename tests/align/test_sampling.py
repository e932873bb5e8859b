"""Answers depend on the seed and on no layout, and the pairs that are made of them can be trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from minitron_megatron.align import REWARDS, AnswerSettings, PairsSummary, Reward, answering, make_pairs
from minitron_megatron.align.pairing import pair_of
from minitron_megatron.align.sampling import decoding_rules, sample_answers
from minitron_megatron.convert import load_hf
from minitron_megatron.data import chat_codec, preference_pairs, read_prompts
from minitron_megatron.errors import DataError, RecipeError
from minitron_megatron.evaluate import Predictor
from minitron_megatron.events import Event
from minitron_megatron.files import read_json
from minitron_megatron.layout import Shape
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.align.test_rewards import write_reward_model
from tests.chats import CHATML, ENDS, TEMPLATES, write_tokenizer
from tests.tiny import LAYOUTS, Stop, transformer, write_llama

SHAPE = Shape(layers=4, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=432)
CONTEXT, MOST = 64, 10
PROMPTS = ("One", "Three, and two?", "Is that all?", "you ä", "a", "Say it again and again")


def vowels(records: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """Count the letters of the record's key `letters`; on the first rank only."""
    return [
        float(sum(text.count(letter) for letter in r["letters"])) for r, text in zip(records, responses, strict=True)
    ]


if "letters" not in REWARDS:
    REWARDS["letters"] = Reward(vowels, needs={"letters": (str,)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose turns end with a token of the template, documents with another, and answers by settings too."""
    made = write_llama(tmp_path_factory.mktemp("answers"), SHAPE, 7)
    write_tokenizer(made, CHATML, "<|endoftext|>")
    ends = {"eos_token_id": list(range(20, 30)), "temperature": 0.1, "top_p": 0.2, "do_sample": True}
    (made / "generation_config.json").write_text(json.dumps(ends))
    return made


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": text, "letters": "abcdefghij", "id": number} for number, text in enumerate(PROMPTS)]
    rows[2] |= {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[2]}]}
    rows[3] |= {"tools": [{"name": "f"}]}
    rows[4]["messages"] = [{"role": "user", "content": rows[4].pop("prompt")}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(
    topology: Topology, folder: Path, prompts: list[list[int]], temperature: float, count: int = 3, first: int = 0
) -> list[list[list[int]]]:
    settings = AnswerSettings(prompts="-", temperature=temperature, top_p=0.98, top_k=300)
    rules = decoding_rules(folder, settings, chat_codec(folder).ends())
    predictor = Predictor(load_hf(folder, topology), topology, micro_batch=4)
    return sample_answers(predictor, prompts, rules, answers=count, max_tokens=MOST, seed=5, first=first)


def ids_of(folder: Path, prompts: Path) -> list[list[int]]:
    codec = chat_codec(folder)
    return [codec.prompt(prompt) for prompt in read_prompts([prompts])]


def test_answers_depend_on_seed_and_numbers_alone(pool: Pool, folder: Path, prompts: Path) -> None:
    ids = ids_of(folder, prompts)
    truth = pool.run(answers, folder, ids, 1.3)[0]
    lengths = {len(answer) for each in truth for answer in each}
    assert len(lengths) > 3 and max(lengths) == MOST, "some end early"
    assert all(len({tuple(answer) for answer in each}) > 1 for each in truth)
    for layout in ("tp2", "pp2", "dp2"):
        assert all(found == truth for found in pool.run(answers, folder, ids, 1.3, **LAYOUTS[layout])), layout
    assert pool.run(answers, folder, ids[2:], 1.3, 2, 2)[0] == [each[:2] for each in truth[2:]]


def test_the_likeliest_answer_is_that_of_transformers(pool: Pool, folder: Path, prompts: Path) -> None:
    """It stops at every end: the settings', the document's and the turn's."""
    ids = ids_of(folder, prompts)
    found = pool.run(answers, folder, ids, 1e-6, 2)[0]
    tokenizer = chat_codec(folder).tokenizer
    ends = [*range(20, 30), *(tokenizer.token_to_id(word) for word in ("<|endoftext|>", "<|im_end|>"))]
    model = transformer(folder)
    model.generation_config.eos_token_id = None
    for prompt, both in zip(ids, found, strict=True):
        options = {"max_new_tokens": MOST, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
        truth = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert both == [truth, truth]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_has_the_tokens_that_training_sees(name: str, tmp_path: Path, prompts: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", TEMPLATES[name], "<|endoftext|>")
    ids = ids_of(folder, prompts)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    pairs = [{"prompt": row.get("prompt", row.get("messages")), "tools": row.get("tools")} for row in rows]
    pairs = [pair | {"chosen": "Fine", "rejected": "two"} for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert [pair.prompt.tolist() for pair in preference_pairs([tmp_path / "pairs.jsonl"], folder)] == ids
    codec = chat_codec(folder)
    assert codec.ends() == {codec.tokenizer.token_to_id(word) for word in ("<|endoftext|>", ENDS[name])}


def settings_of(prompts: Path, **changes: Any) -> AnswerSettings:
    keys: dict[str, Any] = {
        "prompts": prompts,
        "reward": "letters",
        "answers": 3,
        "max_tokens": MOST,
        "temperature": 1.3,
    }
    return AnswerSettings(**keys | changes)


def pairs(
    topology: Topology, folder: Path, settings: AnswerSettings, out: Path, stop_after: int | None = None
) -> tuple[PairsSummary, list[str]]:
    """Make pairs in windows of two prompts; return the summary and the labels of events. stop_after: windows."""
    said: list[str] = []

    def listen(event: Event) -> None:
        said.append(event.label)
        if said.count("sample") == stop_after:
            raise Stop

    with patch.object(answering, "WINDOW", 6):
        model = load_hf(folder, topology) if settings.samples else None
        how: dict[str, Any] = {"seed": 5, "listener": listen}
        return make_pairs(model, topology, settings, folder, out, out.with_suffix(".parts"), **how), said


def test_pairs_are_the_best_and_the_worst_and_can_be_trained_on(pool: Pool, folder: Path, prompts: Path) -> None:
    out = prompts.with_name("pairs.jsonl")
    (summary, said), other = pool.run(pairs, folder, settings_of(prompts), out, dp=2)
    assert summary == other[0] and said.count("sample") == 3
    made = [each for part in sorted(out.with_suffix(".parts").rglob("*.json")) for each in read_json(part)]
    lines, ids = [json.loads(line) for line in out.read_text().splitlines()], ids_of(folder, prompts)
    read = list(preference_pairs([out], folder))
    assert 3 < len(lines) == len(read) == summary["pairs"]
    different = [(each, prompt) for each, prompt in zip(made, ids, strict=True) if len(set(each["rewards"])) > 1]
    for line, pair, (each, prompt) in zip(lines, read, different, strict=True):
        rewards = dict(zip(each["responses"], each["rewards"], strict=True))
        assert rewards == {text: float(sum(text.count(letter) for letter in "abcdefghij")) for text in rewards}
        said_best, said_worst = line["chosen"]["content"], line["rejected"]["content"]
        assert (
            pair.rewards == (max(rewards.values()), min(rewards.values())) == (rewards[said_best], rewards[said_worst])
        )
        assert pair.prompt.tolist() == prompt
    every = [reward for each in made for reward in each["rewards"]]
    assert summary["mean_reward"] == pytest.approx(sum(every) / len(every))
    assert summary["mean_best"] == pytest.approx(sum(max(each["rewards"]) for each in made) / len(made))
    assert (summary["prompts"], summary["all_equal"]) == (len(PROMPTS), len(PROMPTS) - len(different))
    assert summary["ended"] == sum(each["ended"] for each in made) / len(every) and 0 < summary["ended"] < 1
    tools = {line["prompt"][-1]["content"]: line.get("tools") for line in lines}
    assert tools == dict.fromkeys(tools) | {PROMPTS[3]: [{"name": "f"}]}


def test_a_killed_sampling_goes_on_at_another_layout_to_the_same_bytes(pool: Pool, folder: Path, prompts: Path) -> None:
    out, settings = prompts.with_name("pairs.jsonl"), settings_of(prompts)
    whole = pool.run(pairs, folder, settings, out)[0]
    truth = out.read_bytes()
    for part in (parts := out.with_suffix(".parts")).rglob("*.json"):
        part.unlink()
    out.unlink()
    with pytest.raises(Stop):
        pool.run(pairs, folder, settings, out, 2)
    kept = sorted(parts.rglob("*.json"))
    assert len(kept) == 2 and not out.exists()
    (parts / kept[0].parent.name / "00000004.json.partial").write_text("[{")
    before = [part.stat().st_mtime_ns for part in kept]
    summary, said = pool.run(pairs, folder, settings, out, tp=2)[0]
    assert (summary, out.read_bytes()) == (whole[0], truth)
    assert [part.stat().st_mtime_ns for part in kept] == before and said.count("reward") == 1
    pool.run(pairs, folder, settings_of(prompts, top_p=0.5), out)
    assert len(sorted(parts.rglob("*.json"))) == 6, "other settings do not use what is kept"


def test_a_reward_model_is_shared_by_the_ranks(pool: Pool, folder: Path, prompts: Path) -> None:
    from transformers import LlamaForSequenceClassification

    judge = write_reward_model(prompts.with_name("judge"))
    out, settings = prompts.with_name("pairs.jsonl"), settings_of(prompts, reward="model", reward_model=judge, limit=3)
    pool.run(pairs, folder, settings, out, dp=2)
    model, codec = LlamaForSequenceClassification.from_pretrained(judge).eval(), chat_codec(judge)
    line = json.loads(out.read_text().splitlines()[0])
    for which in ("chosen", "rejected"):
        ids = codec.answered({"prompt": line["prompt"]}, line[which]["content"])
        assert line[f"{which}_reward"] == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)


def test_rated_responses_need_no_model(pool: Pool, folder: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "responses": ["b", "c", "d"], "rewards": [0, 2, -1.5]},
        {"prompt": "b", "responses": ["b", "c"], "rewards": [1, 1]},
        {"prompt": "c", "responses": [{"role": "assistant", "content": "x"}, "y"], "rewards": [1, 0]},
    ]
    path, out = tmp_path / "rated.jsonl", tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((summary, _),) = pool.run(pairs, folder, AnswerSettings(prompts=path, reward="column"), out)
    assert summary == {"prompts": 3, "pairs": 2, "all_equal": 1, "mean_reward": 0.5, "mean_best": 4 / 3, "ended": None}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["chosen"]["content"], line["rejected"]["content"]) for line in lines] == [("c", "d"), ("x", "y")]
    assert [pair.rewards for pair in preference_pairs([out], folder)] == [(2.0, -1.5), (1.0, 0.0)]


@pytest.mark.parametrize(
    ("texts", "rewards", "pair"),
    [
        ("abc", (0, 1, 2), ("ca", (2, 0))),
        ("abcd", (1, 3, 3, 1), ("ba", (3, 1))),
        ("abc", (1, 1, 1), None),
        ("aab", (3, 0, 1), ("ab", (3, 1))),
        ("aa", (3, 0), None),
        ("", (), None),
    ],
)
def test_which_two_make_a_pair(texts: str, rewards: tuple[float, ...], pair: object) -> None:
    found = pair_of({}, [{"role": "assistant", "content": text} for text in texts], rewards)
    assert (found and (found.chosen["content"] + found.rejected["content"], found.rewards)) == pair


ROW = '{"prompt": "One", "letters": "a"}\n'


@pytest.mark.parametrize(
    ("rows", "changes", "error", "message"),
    [
        (
            ROW + '{"prompt": "One"}\n',
            {},
            DataError,
            r"p\.jsonl:2 cannot be rated by the reward letters: there is no",
        ),
        (
            ROW + '{"text": "One"}\n',
            {},
            DataError,
            r"p\.jsonl:2 holds the key 'text', and a prompt has prompt or messages\. Rename its keys\.",
        ),
        (
            ROW + '{"prompt": [{"role": "assistant", "content": ""}]}',
            {},
            DataError,
            r"p\.jsonl:2 ends with an assistant turn, so nothing is left to answer\. Remove that turn\.",
        ),
        (
            ROW + json.dumps({"prompt": "a " * 60, "letters": "a"}),
            {},
            DataError,
            r"p\.jsonl:2 has \d+ tokens, and the model's 64 positions leave 54 besides an answer of 10\. Shorten or "
            r"remove the prompt, or lower `max_tokens`\.",
        ),
        (ROW, {"max_tokens": CONTEXT}, RecipeError, r"`max_tokens` is 64, and the model has 64 positions\. Lower it\."),
        (ROW, {"reward": "code"}, RecipeError, "the reward code runs programs that a model wrote"),
        (ROW, {"reward": "broken"}, RecipeError, "the reward broken fails: KeyError: 'absent'"),
        (ROW, {"reward": "short"}, RecipeError, "the reward short gave 1 numbers for 3 answers"),
        (ROW, {"reward": "nan"}, RecipeError, "the reward nan gave nan, which ranks nothing"),
        (ROW, {"reward": "equal"}, DataError, "no pair can be made for .*have equal rewards"),
        ('{"prompt": "a", "a": 1, "a": 2}', {}, DataError, "has the key 'a' twice"),
        ('{"prompt": "a", "responses": ["b"]}', {"reward": "column"}, DataError, "needs two lists of one length"),
        ('{"prompt": "a", "responses": [], "rewards": []}', {"reward": "column"}, DataError, "needs two lists of one"),
        ('{"prompt": "a", "responses": ["b"], "rewards": [NaN]}', {"reward": "column"}, DataError, "not all finite"),
    ],
)
def test_what_cannot_be_answered_or_rated_is_refused_by_name(
    pool: Pool, folder: Path, tmp_path: Path, rows: str, changes: dict[str, Any], error: type, message: str
) -> None:
    (tmp_path / "p.jsonl").write_text(rows)
    if "column" in changes.values():
        settings = AnswerSettings(prompts=tmp_path / "p.jsonl", **changes)
    else:
        settings = settings_of(tmp_path / "p.jsonl", **changes)
    with pytest.raises(error, match=message):
        pool.run(pairs, folder, settings, tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


BROKEN: dict[str, Callable[[Sequence[Any], Sequence[str]], Sequence[float]]] = {
    "broken": lambda records, responses: [record["absent"] for record in records],
    "short": lambda records, responses: [0.0],
    "nan": lambda records, responses: [float("nan")] * len(responses),
    "equal": lambda records, responses: [1.0] * len(responses),
}
for name, rate in BROKEN.items():
    if name not in REWARDS:
        REWARDS[name] = Reward(rate)
