"""Rounds of alignment after distillation: fine-tuning on chats, then preference optimisation."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_megatron.data import load_tokenizer
from minitron_megatron.errors import MinitronError
from minitron_megatron.events import Event
from minitron_megatron.files import read_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.records import read_summary
from minitron_megatron.run import dry_run, run
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.testing import Pool
from tests.chats import CHATML, ENDS, write_tokenizer
from tests.run.test_run import in_a_process
from tests.tiny import SHAPE, Stop, write_llama

LONGEST = """
from minitron_megatron.align import REWARDS, Reward

REWARDS["longest"] = Reward(lambda records, responses: [float(len(each)) for each in responses])
"""
WORDS = ("red", "blue", "two", "three", "tall", "short", "yes", "no")
STEPS = {"warmup_steps": 1, "lr": 2e-3, "min_lr": 1e-4, "save_every": 2, "validate_every": 2, "micro_batch": 2}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model that has a chat template, text, chats and rewarded pairs."""
    folder, draw = tmp_path_factory.mktemp("chats"), random.Random(0)
    write_llama(folder / "model", replace(SHAPE, vocab=448, layers=2), seed=1)
    write_tokenizer(folder / "model", CHATML, ENDS["chatml"])

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    def lines(name: str, count: int, record: Callable[[], dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(record()) + "\n" for _ in range(count)))

    lines("text.jsonl", 120, lambda: {"text": words(30)})
    lines("rated.jsonl", 12, lambda: {"prompt": words(2), "responses": [words(2), words(3)], "rewards": [0.0, 1.0]})
    lines("prompts.jsonl", 12, lambda: {"prompt": words(2)})
    lines("chats.jsonl", 60, lambda: {"prompt": words(4), "response": words(6)})
    lines(
        "pairs.jsonl",
        24,
        lambda: {
            "prompt": words(draw.randrange(1, 5)),
            "chosen": words(draw.randrange(1, 5)) + " fine",
            "rejected": words(draw.randrange(1, 5)),
            "chosen_reward": draw.random() + 1,
            "rejected_reward": draw.random(),
        },
    )
    return folder


Write = Callable[..., Path]


@pytest.fixture(scope="module")
def aligned(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return a function that writes a recipe with rounds, each into a folder of its own."""

    def write(*rounds: dict[str, Any], out: Path | None = None, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("aligned")
        recipe: dict[str, Any] = {
            "model": str(chats / "model"),
            "out": str(out or folder / "run"),
            "dtype": "float32",
            "data": {"sequence": 32, "sources": [{"path": str(chats / "text.jsonl"), "validation": 0.2}]},
            "score": {"samples": 8, "micro_batch": 2},
            "prune": {"hidden": 32, "ffn": 48},
            "distill": {"tokens": 4 * 8 * 32, "global_batch": 8, **STEPS},
            "evaluate": {"samples": 8, "micro_batch": 2},
            "align": [{**STEPS, "global_batch": 4, "validation": 0.2, **each} for each in rounds],
        }
        for each in recipe["align"]:
            if each["method"] == "sft":
                each["sources"] = [{"path": str(chats / "chats.jsonl"), "validation": each.pop("validation")}]
            elif "sample" in each:
                each["sample"] = {"prompts": str(chats / "prompts.jsonl"), **each["sample"]}
            else:
                each["pairs"] = str(chats / "pairs.jsonl")
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | changes))
        return path

    return write


SFT = {"method": "sft", "loss": "mix", "sequence": 48, "tokens": 4 * 4 * 48}
RPO = {"method": "rpo", "beta": 0.1, "epochs": 1.2}
DPO = {"method": "dpo", "epochs": 1}


def work(
    topology: Topology, recipe: Path, stop_at: tuple[str, int] | None = None, until: str | None = None
) -> list[tuple[str, int, dict]]:
    """Run a recipe; return (label, number done, values) of each event. stop_at: label and number to raise Stop at."""
    said: list[tuple[str, int, dict]] = []

    def listen(event: Event) -> None:
        said.append((event.label, event.done, dict(event.values)))
        if (event.label, event.done) == stop_at:
            raise Stop

    run(load_recipe(recipe), topology, listener=listen, until=until)
    return said


def hashes(out: Path) -> dict[str, str]:
    return {path.stem: read_json(path)["result"].get("hash") for path in RunFolder(out).record_paths()}


Whole = tuple[Path, list[tuple[str, int, dict]]]


@pytest.fixture(scope="module")
def whole(pool: Pool, aligned: Write) -> Whole:
    """Run folder of three rounds, and what the run said."""
    recipe = aligned(SFT, RPO, DPO)
    said = pool.run(work, recipe)[0]
    return load_recipe(recipe).out, said


def distilled(aligned: Write, whole: Whole, *rounds: dict[str, Any], **changes: Any) -> Path:
    """Return a recipe with a copy of the run up to distillation."""
    recipe = aligned(*rounds, **changes)
    out = load_recipe(recipe).out
    shutil.copytree(whole[0], out)
    for path in (*(out / "stages").glob("align-*.json"), out / "stages" / "evaluate.json"):
        path.unlink()
    return recipe


def test_rounds_follow_distillation(aligned: Write, whole: Whole) -> None:
    out, said = whole
    rounds = ("align-1", "align-2", "align-3")
    steps = {label: [values for name, _, values in said if name == label] for label in rounds}
    assert [len(values) for values in steps.values()] == [4, 6, 5]
    assert steps["align-1"][-1]["validation_kl"] > 0 and steps["align-1"][-1]["tokens"] > 0
    assert steps["align-2"][0]["preference_margin"] == pytest.approx(0, abs=1e-4)
    assert steps["align-2"][-1]["pairs"] == 24
    assert steps["align-2"][-1]["validation_preference_margin"] > 0 and steps["align-2"][-1]["reward_gap"] > 0
    assert "reward_gap" in steps["align-3"][0] and steps["align-3"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    rows = [row["model"] for row in read_summary(RunFolder(out).summary)]
    assert rows == ["teacher", "pruned", "distilled", *("aligned-1", "aligned-2", "aligned-3")]
    found = hashes(out)
    assert len({found[name] for name in ("distill", *rounds)}) == 4
    stops = read_json(out / "export" / "generation_config.json")["eos_token_id"]
    assert load_tokenizer(out / "export").token_to_id(ENDS["chatml"]) in stops
    assert (out / "export" / "chat_template.jinja").is_file() and not list((out / "alignment").glob("*/*"))


def test_an_edited_round_reruns_what_follows(aligned: Write, whole: Whole) -> None:
    def states(*rounds: dict[str, Any]) -> dict[str, str]:
        return {step.stage: step.state for step in dry_run(load_recipe(aligned(*rounds, out=whole[0])))}

    assert set(states(SFT, RPO, DPO).values()) == {"done"}
    assert states(SFT | {"save_every": 3}, RPO, DPO) == states(SFT, RPO, DPO)
    edited = states(SFT, RPO | {"beta": 0.3}, DPO)
    assert [name for name, state in edited.items() if state == "run"] == ["align-2", "align-3", "evaluate", "export"]
    assert [name for name, state in states(SFT, RPO).items() if state == "run"] == ["evaluate", "export"]


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2, "sequence_parallel": True}, {"dp": 2, "cp": 2}])
def test_the_layout_changes_no_curve(pool: Pool, aligned: Write, whole: Whole, layout: dict[str, Any]) -> None:
    keys = {key: size for key, size in layout.items() if key != "dp"}
    other = pool.run(work, distilled(aligned, whole, SFT, RPO, parallel=keys), None, "align", **layout)[0]
    for label in ("align-1", "align-2"):
        for key in ("loss", "grad_norm", "validation_loss"):
            one, two = ([v[key] for name, _, v in said if name == label and key in v] for said in (whole[1], other))
            assert two == pytest.approx(one, rel=2e-4, abs=1e-6), (label, key)


def test_interrupted_rounds_resume_to_the_bit(pool: Pool, aligned: Write, whole: Whole) -> None:
    recipe = distilled(aligned, whole, SFT, RPO)
    for stop in (("align-1", 3), ("reference", 1), ("align-2", 3)):
        with pytest.raises(Stop):
            pool.run(work, recipe, stop)
    said = pool.run(work, recipe, None, "align")[0]
    trained = [(label, done) for label, done, _ in said if label.startswith(("align", "reference"))]
    assert {label for label, _ in trained} == {"align-2"} and trained[-1] == ("align-2", 6)
    found, expected = hashes(load_recipe(recipe).out), hashes(whole[0])
    assert [found[name] for name in ("align-1", "align-2")] == [expected[name] for name in ("align-1", "align-2")]


SAMPLED = {
    "method": "rpo",
    "epochs": 2,
    "sample": {"reward": "longest", "answers": 3, "max_tokens": 8, "micro_batch": 8},
}


def test_two_sampled_rounds_killed_by_the_system_give_the_same_models(aligned: Write, chats: Path) -> None:
    """Each round samples its own pairs; kills fall amid each round's training, sampling and a reference."""
    whole, cut = (aligned(SFT, SAMPLED, SAMPLED, plugins=["longest"]) for _ in range(2))
    for recipe in (whole, cut):
        (recipe.parent / "longest.py").write_text(LONGEST)
    assert in_a_process(whole) == 0
    for kill_at in (
        ("align-1", "align-1", 3),
        ("align-2", "generate", 2),
        ("align-2", "align-2", 3),
        ("align-3", "reference", 1),
        ("align-3", "align-3", 3),
    ):
        assert in_a_process(cut, kill_at) == -signal.SIGKILL
    assert in_a_process(cut) == 0
    expected, found = (hashes(load_recipe(recipe).out) for recipe in (whole, cut))
    assert found == expected and len({found[f"align-{number}"] for number in (1, 2, 3)}) == 3
    pairs = [(load_recipe(cut).out / "alignment" / str(number) / "pairs.jsonl").read_text() for number in (2, 3)]
    assert pairs[0] != pairs[1]
    record = read_json(RunFolder(load_recipe(cut).out).record("align-3"))["result"]
    assert record["sampled"]["prompts"] == 12 and record["units"] > 0


def test_a_round_of_rated_answers_at_several_ranks(pool: Pool, aligned: Write, whole: Whole, chats: Path) -> None:
    """Each rank has the same result, on which the fingerprint of the next round depends."""
    rated = RPO | {"sample": {"prompts": str(chats / "rated.jsonl"), "reward": "column"}}
    recipe = distilled(aligned, whole, rated, DPO, parallel={"tp": 2, "pp": 2})
    said = pool.run(work, recipe, None, "align", tp=2, pp=2)
    steps = [[done for label, done, _ in events if label == "align-2"] for events in said]
    assert steps == [[1, 2, 3, 4, 5]] * 4
    found = read_json(RunFolder(load_recipe(recipe).out).record("align-1"))["result"]["sampled"]
    assert (found["prompts"], found["pairs"], found["mean_best"]) == (12, 12, 1.0)


def test_a_reference_measured_at_one_layout_serves_another(pool: Pool, aligned: Write, whole: Whole) -> None:
    recipe = distilled(aligned, whole, RPO, parallel={"tp": 2, "pp": 2})
    with pytest.raises(Stop):
        pool.run(work, recipe, ("align-1", 1), tp=2, pp=2)
    said = pool.run(work, aligned(RPO, out=load_recipe(recipe).out), None, "align")[0]
    assert "align-1" in [label for label, _, _ in said] and "reference" not in [label for label, _, _ in said]


def test_the_papers_order_is_a_recipe() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "examples" / "align" / "mn-minitron-8b-instruct.yaml")
    assert [keys.method for keys in recipe.align] == ["sft", "sft", "rpo", "rpo"]


@pytest.mark.parametrize(
    ("keys", "record", "says"),
    [
        ({"method": "rpo"}, {"prompt": "a", "chosen": "b", "rejected": "c"}, r"own\.jsonl:1 has no rewards"),
        (
            {"method": "dpo"},
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            r"same response as chosen and as rejected",
        ),
        (
            {"method": "dpo"},
            {"prompt": "a " * 80, "chosen": "b", "rejected": "c"},
            r"own\.jsonl:1 has a prompt of \d+ tokens",
        ),
        (
            {"method": "dpo", "sequence": 128},
            None,
            r"align\.0\.sequence is 128, but the model has a max_position_emb.*\. Set",
        ),
        (
            {"method": "dpo", "lr": 1e-9},
            None,
            r"align\.0\.lr is 1e-09, below align\.0\.min_lr, .*\. Set align\.0\.min_lr to",
        ),
        (
            {"method": "dpo", "warmup_steps": 9},
            None,
            r"align\.0\.warmup_steps is 9, but training has only 5 steps\. Set",
        ),
        ({"method": "dpo", "global_batch": 3}, None, r"align\.0\.global_batch is 3, which cannot be split"),
    ],
)
def test_what_cannot_be_aligned_is_one_message(
    pool: Pool, aligned: Write, tmp_path: Path, keys: dict, record: dict | None, says: str
) -> None:
    recipe = aligned(keys)
    if record is not None:
        own = yaml.safe_load(recipe.read_text())
        (tmp_path / "own.jsonl").write_text(json.dumps(record) + "\n")
        own["align"][0]["pairs"] = str(tmp_path / "own.jsonl")
        recipe.write_text(yaml.safe_dump(own))
    with pytest.raises(MinitronError, match=says):
        pool.run(work, recipe)
