"""Fingerprints: every key either affects results or is marked HowToRun; files count by what a stage reads of them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from minitron_megatron.recipe import Recipe
from minitron_megatron.run import STAGES, wanted
from minitron_megatron.run.fingerprint import fingerprint
from minitron_megatron.settings import Settings
from minitron_megatron.train import OBJECTIVES, LMObjective
from tests.recipes import tiny_recipe

DONE: dict[str, Any] = {"prepare": {"sources": {}, "model_hash": "a"}, "correct": {"hash": "b"}, "prune": {"hash": "c"}}
DONE |= {"distill": {"hash": "d"}, "align-1": {"hash": "e"}}
HOW_TO_RUN = {
    *("align.1.sample.micro_batch", "evaluate.judge.key_env", "evaluate.judge.concurrent"),
    "tokenizer",  # its files count, in the folder that a Megatron checkpoint becomes
    *("out", "recompute", "spec", "hang_seconds", "data.repeat", "data.workers", "score.micro_batch"),
    *(
        "evaluate.micro_batch",
        "search.light.micro_batch",
        "search.light.independent_replicas",
        "distill.phases.micro_batch",
    ),
    *("distill.loss.budget_mib", "distill.retain", "distill.teacher_window", "distill.offload_teacher"),
    *(
        f"{block}.{key}"
        for block in ("correct", "distill", "align.0", "align.1")
        for key in ("micro_batch", "save_every", "keep_checkpoints", "save_async", "validate_every")
    ),
}
BLOCKS = ("parallel.", "bench.", "log.")
OBJECTIVES["perplexity"] = LMObjective
EDITS: dict[str, Any] = {
    "plugins": ["json"],
    "correct.objective": "perplexity",
    "distill.objective": "perplexity",
    "align.0.sequence": 8,
    "align.0.tokens": 999,
    "align.0.loss": "kd",
    "align.0.sources.validation": 0.5,
    "align.0.sources.format": "text",
    "align.0.sources.loss_on": "all",
    "align.1.method": "rpo",
    "align.1.loss": "ipo",
    "align.1.label_smoothing": 0.1,
    "align.1.sequence": 8,
    "align.1.validation": 0.5,
    "align.1.sample.reward": "column",
    "align.1.sample.top_p": 0.5,
    "align.1.sample.limit": 4,
    "dtype": "bfloat16",
    "recompute": "full",
    "spec": "te",
    "data.text_key": "body",
    "data.separator": "---",
    "data.tokenize": "needed",
    "data.sources.validation": 0.5,
    "data.sources.format": "chat",
    "data.sources.loss_on": "all",
    "score.sources.format": "chat",
    "score.sources.loss_on": "all",
    "correct.parameters": "norms",
    "score.dtype": "bfloat16",
    "score.statistic.batch": "mean",
    "score.statistic.sequence": "l2",
    "score.statistic.neurons": "pre",
    "score.statistic.heads": "norm_first",
    "score.depth.metric": "kl",
    "score.depth.lengths": [2],
    "prune.kv_groups": 1,
    "prune.experts": 2,
    "prune.expert_ffn": 2,
    "prune.shared_ffn": 2,
    "prune.layers": 3,
    "prune.teacher": "original",
    "prune.by": "first",
    "prune.scope": "network",
    "prune.merge": "q",
    "prune.merge_sign": "reversed",
    "prune.refit": "outputs",
    "prune.refit_ridge": 0.5,
    "distill.loss.divergence": "jsd",
    "distill.loss.beta": 0.25,
    "distill.loss.top_k": 5,
    "distill.loss.ce_weight": 0.5,
    "distill.loss.budget_mib": 1,
    "distill.states.outputs": ["1:1"],
    "distill.states.mlp_inputs": ["1:1"],
    "distill.states.attention": ["1:1"],
    "distill.states.loss": "mse",
    "distill.states.alpha": 0.5,
    "distill.phases.sequence": 8,
    "distill.phases.weights": [2.0],
    "distill.phases.global_batch": 16,
    "distill.phases.micro_batch": 1,
    "distill.phases.lr": 1e-3,
    "distill.phases.min_lr": 1e-5,
    "distill.phases.warmup_steps": 1,
    "distill.teacher_window": 1,
    "distill.teacher_dtype": "float8",
    "evaluate.suite": "base",
    "evaluate.tasks.name": "arc_easy",
    "evaluate.tasks.shots": 2,
    "evaluate.tasks.metric": "acc_norm",
    "evaluate.tasks.temperature": 0.5,
    "evaluate.tasks.top_p": 0.5,
    "evaluate.limit": 4,
    "evaluate.judge.url": "http://other/v1",
    "evaluate.judge.model": "other",
    "evaluate.judge.key_env": "OTHER",
    "export.dtype": "float32",
    "export.architecture": "own",
    "export.quantize": "fp8",
    "bench.ladder": [[8, 8]],
    "bench.batches": [1],
    "log.wandb": "offline",
    "log.project": "other",
    "search.layers": [4],
    "search.hidden": [32],
    "search.ffn": [32],
    "search.expansion": [2.0],
    "search.heads": [4],
    "search.kv_groups": [1],
    "search.experts": [2],
    "search.expert_ffn": [2],
    "search.shared_ffn": [2],
    "search.multiples": {"ffn": 16},
    "search.serving.context": 8,
    "search.serving.weights": "float8",
    "search.serving.kv_cache": "float8",
    "search.serving.gpu": "H100",
    "search.light.lr": 1e-3,
    "search.light.min_lr": 1e-5,
    "search.light.warmup_steps": 1,
    "search.light.global_batch": 16,
    "search.light.micro_batch": 1,
    "search.choose": "pareto",
    "search.winner": "x",
}
"""Other values for keys that cannot simply be doubled or negated."""


def leaves(block: type[Settings], place: str = "") -> Iterator[str]:
    """Yield the keys of a block; those of the kinds of a list's blocks by their number: `align.0.lr`, `align.1.lr`."""
    for name, field in block.model_fields.items():
        inner = [each for each in kinds(field.annotation) if isinstance(each, type) and issubclass(each, Settings)]
        for number, each in enumerate(dict.fromkeys(inner)):
            yield from leaves(each, f"{place}{name}.{number}." if len(inner) > 1 else f"{place}{name}.")
        yield from [] if inner else [f"{place}{name}"]


def kinds(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from kinds(part)


KEYS = [key for key in leaves(Recipe) if key != "align.0.method" and not key.startswith("family.")]
"""Every key, but for one that says which other keys there are, and for a family's, whose runs have recipes without."""


def base(material: Path, key: str) -> dict[str, Any]:
    """Recipe with every block."""
    recipe = tiny_recipe(material) | {"score": {"samples": 16, "micro_batch": 2, "depth": {}}}
    states: dict[str, Any] = {"states": {"outputs": ["0:0"]}} if key.startswith("distill.states") else {}
    recipe["distill"] = recipe["distill"] | states | {"phases": [{"tokens": 2 * 8 * 16}], "loss": {"divergence": "jsd"}}
    if key in ("distill.loss.temperature", "distill.loss.divergence", "distill.objective"):
        recipe["distill"]["loss"] = {}
    recipe["evaluate"] = recipe["evaluate"] | {"tasks": [{"name": "piqa"}]}
    if key.startswith("evaluate.judge."):
        recipe["evaluate"]["judge"] = {"url": "http://localhost/v1", "model": "judge"}
    if key == "student":
        recipe |= {"student": str(material / "model"), "prune": {}, "score": {}}
    if key.startswith("score.sources."):
        recipe["score"] = recipe["score"] | {"sources": [{"path": str(material / "corpus.jsonl")}]}
    if key.endswith("sources.loss_on") and not key.startswith("align"):
        recipe[key.partition(".")[0]]["sources"][0]["format"] = "chat"
    if key.startswith("align."):
        places = str(material / "corpus.jsonl")
        sample: dict[str, Any] = {"prompts": places, "answers": 4}
        if key.endswith("reward_model"):
            sample |= {"reward": "model", "reward_model": str(material / "model")}
        pairs = {"sample": sample} if ".sample." in key else {"pairs": places}
        recipe["align"] = [{"method": "sft", "sources": [{"path": places}]}, {"method": "dpo", **pairs}]
    if key.startswith("search."):
        size = {"hidden": [48]} if key == "search.expansion" else {"ffn": [48, 64]}
        recipe["search"] = {**size, "budget": {"params": 10**6}, "light": {"tokens": 128}}
        recipe["prune"] = {}
    return recipe


def edited(recipe: dict[str, Any], key: str, material: Path) -> dict[str, Any]:
    new, old = copy.deepcopy(recipe), Recipe.model_validate(recipe)
    node: Any = new
    *path, last = key.split(".")
    for part in path:
        if isinstance(node, list):
            at = int(part) if part.isdecimal() else 0
            node, old = node[at], old[at]
        if not part.isdecimal():
            old, node = getattr(old, part), node.setdefault(part, {})
    if isinstance(node, list):
        node, old = node[0], old[0]
    value = getattr(old, last)
    if key in EDITS:
        node[last] = EDITS[key]
    elif key.startswith("search.budget."):
        node[last] = 7.0
    elif isinstance(value, Path) or key in (
        "data.sources.path",
        "score.sources.path",
        *("align.0.sources.path", "align.1.pairs", "align.1.sample.prompts"),
        "tokenizer",
        "evaluate.task_files",
        "distill.start",
        "search.serving.table",
    ):
        text = key.startswith(("data", "search", "score", "align")) and not key.endswith("reward_model")
        source = material / ("corpus.jsonl" if text else "model")
        node[last] = str(material / f"other-{source.name}")
    else:
        assert isinstance(value, bool | int | float), f"{key} needs an edit here"
        node[last] = not value if isinstance(value, bool) else value * 2 or 1
    return new


def marks(recipe: dict[str, Any]) -> dict[str, str]:
    loaded = Recipe.model_validate(recipe)
    return {stage.name: fingerprint(stage, loaded, DONE) for stage in wanted(loaded)}


@pytest.fixture(scope="module")
def elsewhere(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual material, with a second model and corpus."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("model", "other-model"):
        shutil.copytree(material / "model", folder / name)
        (folder / name / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for name in ("corpus.jsonl", "other-corpus.jsonl"):
        shutil.copyfile(material / "corpus.jsonl", folder / name)
    return folder


def test_the_keys_that_say_how_to_run_are_these() -> None:
    assert set(KEYS) >= HOW_TO_RUN and len(KEYS) == len(set(KEYS))


@pytest.mark.parametrize("key", KEYS)
def test_an_edited_key_changes_a_fingerprint_unless_it_says_how_to_run(elsewhere: Path, key: str) -> None:
    before = base(elsewhere, key)
    changed = marks(before) != marks(edited(before, key, elsewhere))
    assert changed == (key not in HOW_TO_RUN and not key.startswith(BLOCKS))


def rewritten(path: Path, **changes: Any) -> None:
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(told | changes))


FILES = [
    ("tokenizer_config.json", {"chat_template": "mended"}, {"export"}),
    ("generation_config.json", {"eos_token_id": [0, 3], "top_p": 0.5}, {"export"}),
    ("tokenizer_config.json", {"eos_token": "w5"}, {"prepare", "export"}),
    ("config.json", {"rms_norm_eps": 1e-3}, {"prepare"}),
    ("config.json", {"architectures": ["Same"]}, set()),
    ("notes.md", {}, set()),
]


@pytest.mark.parametrize(("name", "changes", "again"), FILES, ids=[f"{file[0]}-{len(file[1])}" for file in FILES])
@pytest.mark.parametrize("tasks", [False, True])
def test_a_file_counts_by_what_a_stage_reads_of_it(
    material: Path, tmp_path: Path, name: str, changes: dict[str, Any], again: set[str], tasks: bool
) -> None:
    shutil.copytree(material / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [0]}')
    recipe = tiny_recipe(material) | {"model": str(tmp_path / "model")}
    if tasks:
        recipe["evaluate"] = {"tasks": [{"name": "piqa"}], "chat": "chat_template" in changes}
        again = again | {"evaluate"} if "export" in again else again
    before = marks(recipe)
    rewritten(tmp_path / "model" / name, **changes)
    after = marks(recipe)
    assert {stage for stage in before if before[stage] != after[stage]} == again


def test_a_chat_template_counts_for_chats(material: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(material) | {"model": str(shutil.copytree(material / "model", tmp_path / "model"))}
    recipe["data"]["sources"][0]["format"] = "chat"
    keys, found = Recipe.model_validate(recipe), []
    for template in ("{{ messages[0].content }}", "{{ messages[1].content }}"):
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        found.append(fingerprint(STAGES["prepare"], keys, {}))
    assert found[0] != found[1]
    assert not keys.data.cross_documents and Recipe.model_validate(tiny_recipe(material)).data.cross_documents


def test_weights_written_anew_are_seen(material: Path, tmp_path: Path) -> None:
    shutil.copytree(material / "model", tmp_path / "model")
    recipe = tiny_recipe(material) | {"model": str(tmp_path / "model")}
    before = marks(recipe)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert marks(recipe)["prepare"] != before["prepare"]
