"""Errors in a recipe are reported before work begins: alike by `run`, `--dry-run`, `estimate` and `--slurm`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from minitron_megatron.cli import app
from minitron_megatron.errors import DataError, MinitronError, RecipeError
from minitron_megatron.files import read_json, write_json
from minitron_megatron.forecast import estimate
from minitron_megatron.forecast.check import INDEX_BYTES, _check_index, check, check_corpus, planned
from minitron_megatron.forecast.check_files import _check_out
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe, starter_recipe
from minitron_megatron.run import dry_run, run
from minitron_megatron.testing import Pool

Write = Callable[..., Path]

WRONG: list[tuple[list[str], str]] = [
    (["model=nowhere"], "nowhere"),
    (["data.sources=[{path: nowhere.jsonl}]"], "nowhere.jsonl"),
    (["prune.hidden=49"], "axis hidden"),
    (["prune.heads=5"], "axis heads"),
    (["prune.ffn=33", "parallel.tp=2"], "axis ffn"),
    (["parallel.pp=9"], "pp"),
    (["parallel.ep=2"], "ep=2"),
    (["parallel.cp=2", "data.sequence=15"], "cp=2"),
    (["parallel.vp=2"], "vp=2"),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel has no effect"),
    (["distill.global_batch=9"], "distill.global_batch is 9"),
    (["correct.micro_batch=3"], "correct.global_batch"),
    (["score.samples=3"], "score.samples is 3"),
    (["distill.lr=1e-6"], "distill.lr is 1e-06, below distill.min_lr, 1e-05. Set distill.min_lr to 1e-06 or less."),
    (["correct.min_lr=1"], "correct.lr is 0.005, below correct.min_lr, 1"),
    (["distill.phases=[{tokens: 1e3, sequence: 16, lr: 1e-7}]"], "distill.phases.0.lr is 1e-07"),
    (
        ["distill.warmup_steps=6"],
        "distill.warmup_steps is 6, but training has only 6 steps. Set distill.warmup_steps below 6, or raise distill.",
    ),
    (["correct.warmup_steps=40"], "correct.warmup_steps is 40"),
    (["correct={continuous: true, tokens: 1, warmup_steps: 12}"], "correct.warmup_steps is 12"),
    (["distill.tokens=1e7"], "distill.tokens needs"),
    (["correct.tokens=1e7"], "correct.tokens needs"),
    (["score.samples=100000"], "score.samples needs"),
    (["distill.tokens=1e18", "data.repeat=true"], "index alone takes"),
    (
        ["data.sequence=65", "correct.warmup_steps=1", "distill.warmup_steps=1"],
        "but the model has a max_position_embeddings of 64. Set data.sequence to 64 or less, or data.beyond_positions",
    ),
    (["distill.phases=[{tokens: 1e5, sequence: 128}]"], "distill.phases.0.sequence is 128"),
    (["prune.merge=qkvo"], "merge qkvo"),
    (
        ["prune={hidden: 32, merge: q}"],
        "heads are to be merged, but the plan cuts no heads. Cut heads, or merge nothing.",
    ),
    (["prune={heads: 2, merge: q}"], "Keep at least half of them"),
    (["prune={hidden: 47, iterations: 40}"], "prune.iterations is 40, but no axis loses more than 1. Lower it."),
    (
        ["correct.parameters=lora", "correct.lora_rank=49"],
        "correct.lora_rank is 49, but no matrix has a rank above 48. Lower it.",
    ),
    (["search={hidden: [32], budget: {params: 7e4}, choose: losss}", "prune={}"], "search.choose 'losss'"),
    (["distill.loss.top_k=132"], "distill.loss.top_k is 132"),
    (["search={hidden: [80], budget: {params: 7e4}}", "prune={}"], "tries search.hidden 80"),
    (["search={hidden: [32], budget: {params: 7e9}}", "prune={}"], "the limit on search.budget.params is at most"),
    (["search={hidden: [32], budget: {decode_ms: 1}}", "prune={}"], "Set search.serving.gpu or search.serving.table"),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=[" ".join(keys)[:50] for keys, _ in WRONG])
def test_every_way_into_a_recipe_says_what_is_wrong(recipe_file: Write, overrides: list[str], said: str) -> None:
    recipe = load_recipe(recipe_file(), overrides)
    for way in (dry_run, estimate):
        with pytest.raises(MinitronError) as caught:
            way(recipe)
        assert said in str(caught.value)
    assert not recipe.out.exists()


def attempt(topology: Topology, recipe: Path, overrides: list[str]) -> str:
    try:
        run(load_recipe(recipe, overrides), topology)
    except MinitronError as error:
        return str(error)
    return ""


def test_a_run_is_checked_by_the_same_function_before_anything_is_written(recipe_file: Write, pool: Pool) -> None:
    recipe = recipe_file()
    for overrides, said in WRONG[:2] + WRONG[10:18]:
        assert said in pool.run(attempt, recipe, overrides)[0]
    assert not load_recipe(recipe).out.exists()


def test_more_processes_split_batches_further(recipe_file: Write) -> None:
    recipe = load_recipe(recipe_file())
    check(recipe, planned(recipe, 2))
    with pytest.raises(MinitronError, match=r"global_batch is 8, .* on 4 data-parallel ranks"):
        estimate(recipe, gpus=4)
    with pytest.raises(MinitronError, match="needs a multiple of 2 processes, not 3"):
        estimate(load_recipe(recipe_file(), ["parallel.tp=2", "prune.ffn=32"]), gpus=3)


@pytest.mark.parametrize("out", ["model/run", "model", "corpus/run", "corpus"])
def test_a_run_folder_lies_apart_from_what_is_read(
    recipe_file: Write, material: Path, tmp_path: Path, out: str
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes((material / "corpus.jsonl").read_bytes())
    (tmp_path / "model").symlink_to(material / "model")
    sources = json.dumps([{"path": str(tmp_path / "corpus"), "validation": 0.2}])
    recipe = load_recipe(recipe_file(), [f"data.sources={sources}", f"out={tmp_path / out}"])
    with pytest.raises(MinitronError, match=r"out is .* which is inside"):
        dry_run(recipe)
    inside = json.dumps([{"path": str(tmp_path / "corpus"), "validation": 0.2}])
    with pytest.raises(MinitronError, match="is inside the run folder"):
        dry_run(load_recipe(recipe_file(), [f"data.sources={inside}", f"out={tmp_path}"]))
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "b.jsonl").write_bytes((material / "corpus.jsonl").read_bytes())
    (tmp_path / "corpus" / "c").symlink_to(tmp_path / "later")
    with pytest.raises(MinitronError, match=r"later/b\.jsonl \(data\.sources\) is inside the run folder"):
        dry_run(load_recipe(recipe_file(), [f"data.sources={inside}", f"out={tmp_path / 'later'}"]))


@pytest.mark.parametrize("out", ["file", "file/run", "link", "link/run"])
def test_a_run_folder_that_cannot_be_one_is_refused(recipe_file: Write, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    recipe = load_recipe(recipe_file(), [f"out={tmp_path / out}"])
    for look in (dry_run, estimate):
        with pytest.raises(MinitronError, match=r"out is .*, but .*/(file is not a folder|link is a link to nowhere)"):
            look(recipe)


@pytest.mark.parametrize("kind", ["the file", "a link to it", "its folder", "another source's"])
def test_training_text_is_no_held_out_text(recipe_file: Write, material: Path, tmp_path: Path, kind: str) -> None:
    corpus, folder = tmp_path / "text" / "a.jsonl", tmp_path / "text"
    folder.mkdir()
    corpus.write_bytes((material / "corpus.jsonl").read_bytes())
    (tmp_path / "link.jsonl").symlink_to(corpus)
    (tmp_path / "other.jsonl").write_bytes(corpus.read_bytes())
    sources: dict[str, Any] = {
        "the file": [{"path": corpus, "validation": corpus}],
        "a link to it": [{"path": corpus, "validation": tmp_path / "link.jsonl"}],
        "its folder": [{"path": corpus, "validation": folder}],
        "another source's": [{"path": tmp_path / "other.jsonl", "validation": corpus}, {"path": corpus}],
    }
    said = json.dumps(sources[kind], default=str)
    with pytest.raises(
        MinitronError,
        match=r"a\.jsonl is both training text and held-out text\. Give other files in data\.sources\[\]\.valid",
    ):
        dry_run(load_recipe(recipe_file(), [f"data.sources={said}"]))


def test_no_text_is_in_two_sources(recipe_file: Write, material: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(material / "corpus.jsonl")
    said = json.dumps([{"path": str(material / "corpus.jsonl")}, {"path": f"{tmp_path}/*.jsonl", "validation": 0.3}])
    with pytest.raises(
        MinitronError, match=r"corpus\.jsonl is in data\.sources\.0 and in data\.sources\.1: .*Name it once"
    ):
        dry_run(load_recipe(recipe_file(), [f"data.sources={said}"]))


def test_counted_tokens_are_held_against_every_later_budget(recipe_file: Write) -> None:
    sources = {"0-corpus": {"tokens": 48 * 16 + 1, "validation_tokens": 17}}
    recipe = load_recipe(recipe_file())
    check_corpus(recipe, sources)
    for tokens, asked in (
        (48 * 16, "correct.tokens needs 48 samples of 16 tokens from 0-corpus"),
        (15 * 16 + 1, "correct.tokens"),
    ):
        with pytest.raises(DataError, match=asked):
            check_corpus(recipe, {"0-corpus": {"tokens": tokens, "validation_tokens": 17}})
    repeating = load_recipe(recipe_file(), ["data.repeat=true"])
    with pytest.raises(DataError, match=r"score\.samples needs 16 samples of 16 tokens from 0-corpus"):
        check_corpus(repeating, {"0-corpus": {"tokens": 15 * 16 + 1, "validation_tokens": 17}})
    held_out = (
        r"^the held-out text of 0-corpus has 16 tokens, less than one sample of 16\. Hold out more "
        r"\(data\.sources\[\]\.validation\), or set a shorter data\.sequence\.$"
    )
    with pytest.raises(DataError, match=held_out):
        check_corpus(recipe, {"0-corpus": {"tokens": 48 * 16 + 1, "validation_tokens": 16}})


def test_text_that_is_short_or_empty_is_known_before_it_is_read(
    recipe_file: Write, material: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.jsonl").write_text('{"a": 1}')
    (tmp_path / "empty.jsonl").touch()
    for held_out, said in (
        (
            "short",
            "the held-out text of corpus has 8 bytes, less than one sample of 16 tokens. Hold out more, or set a "
            "shorter data.sequence.",
        ),
        ("empty", f"data source {tmp_path}/empty.jsonl is empty. Check data.sources[].validation."),
    ):
        source = {"path": str(material / "corpus.jsonl"), "validation": str(tmp_path / f"{held_out}.jsonl")}
        with pytest.raises(DataError) as caught:
            dry_run(load_recipe(recipe_file(), [f"data.sources={json.dumps([source])}"]))
        assert str(caught.value) == said


def test_a_run_folder_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(RecipeError) as caught:
        _check_out(tmp_path / "run", must_be_writable=True)
    assert str(caught.value) == (
        f"out is {tmp_path}/run, which cannot be made: {tmp_path} is not writable. Give another path."
    )


def test_an_index_larger_than_the_machines_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**30))
    phase: Any = SimpleNamespace(samples=10**9)
    with pytest.raises(RecipeError) as caught:
        _check_index("distill", phase)
    size = f"{10**9 * INDEX_BYTES / 2**30:.3g}"
    assert str(caught.value) == (
        f"distill.tokens means 1e+09 samples, whose index alone takes {size} GiB, but this machine has 1 GiB. Lower "
        "distill.tokens."
    )


def test_a_blend_asks_each_source_for_its_share(recipe_file: Write) -> None:
    sources = [{"path": "a.jsonl", "weight": 3.0}, {"path": "b.jsonl", "weight": 1.0}]
    recipe = load_recipe(recipe_file(), [f"data.sources={json.dumps(sources)}"])
    there = {
        "0-a": {"tokens": 36 * 16 + 1, "validation_tokens": 17},
        "1-b": {"tokens": 12 * 16 + 1, "validation_tokens": 17},
    }
    check_corpus(recipe, there)
    with pytest.raises(DataError, match="needs 12 samples of 16 tokens from 1-b, but it has only 11"):
        check_corpus(recipe, there | {"1-b": {"tokens": 12 * 16, "validation_tokens": 17}})


def test_estimate_needs_neither_weights_nor_tokenizer(recipe_file: Write, material: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((material / "model" / "config.json").read_bytes())
    recipe = load_recipe(recipe_file(), [f"model={tmp_path / 'bare'}"])
    assert estimate(recipe).gpus == 1
    with pytest.raises(MinitronError, match=r"model\.safetensors"):
        dry_run(recipe)


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_rates_and_memories_are_numbers(recipe_file: Write, value: str) -> None:
    for option in ("--mfu", "--memory"):
        result = CliRunner().invoke(app, ["estimate", str(recipe_file()), option, value])
        assert result.exit_code == 2 or isinstance(result.exception, MinitronError), result.output


@pytest.mark.parametrize("name", ["model", "a: b", "#x", "yes", "[bold]", "it's", 'say "x"', "-x", "1e3", "a\nb", "é"])
def test_init_writes_a_recipe_that_loads_and_passes(material: Path, tmp_path: Path, name: str) -> None:
    model = tmp_path / name
    model.symlink_to(material / "model")
    path = tmp_path / "starter.yaml"
    path.write_text(starter_recipe(model))
    corpus = json.dumps([{"path": str(material / "corpus.jsonl"), "validation": 0.2}])
    recipe = load_recipe(path, [f"data.sources={corpus}", "data.sequence=16", "data.repeat=true", "score.samples=16"])
    assert recipe.model == model and recipe.out.name == "model"
    assert estimate(recipe).warnings == ()


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
        {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1},
        {"hidden_size": 2, "intermediate_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 5, "num_key_value_heads": 5},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_init_proposes_shapes_that_every_check_lets_through(
    material: Path, tmp_path: Path, kind: str, sizes: dict[str, int]
) -> None:
    config = read_json(material / "model" / "config.json") | sizes | {"model_type": kind}
    config["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    if kind == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    write_json(tmp_path / "model" / "config.json", {k: v for k, v in config.items() if k not in ("mlp_bias",)})
    told = yaml.safe_load(starter_recipe(tmp_path / "model"))
    told["data"]["sources"] = [{"path": str(material / "corpus.jsonl"), "validation": 0.2}]
    told["data"] |= {"sequence": 16, "repeat": True}
    told["score"] = {"samples": 16}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    found = estimate(load_recipe(tmp_path / "recipe.yaml"))
    assert found.warnings == ()
    if sizes["hidden_size"] > 2:
        assert found.student_parameters < found.teacher_parameters
