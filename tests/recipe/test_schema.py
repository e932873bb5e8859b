"""Recipe keys: the papers' defaults, strict names, errors in the user's terms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from minitron_megatron import recipe as package
from minitron_megatron.data import prepare
from minitron_megatron.errors import DataError, RecipeError
from minitron_megatron.losses import KDLoss
from minitron_megatron.recipe import json_schema, load_recipe, recipe_with, with_keys, with_keys_in_errors

Write = Callable[..., Path]


def test_the_defaults_are_those_of_llama_31_minitron(recipe_file: Write) -> None:
    recipe = load_recipe(recipe_file(correct={}, distill=None, score=None, data={"sources": [{"path": "x"}]}))
    distill, correct, score = recipe.distill, recipe.correct, recipe.score
    assert correct is not None
    assert (distill.tokens, distill.global_batch, distill.lr, distill.min_lr) == (94 * 10**9, 1152, 1e-4, 1e-5)
    assert (distill.warmup_steps, correct.warmup_steps, correct.tokens) == (40, 120, 100 * 10**9)
    assert (recipe.data.sequence, score.samples) == (8192, 1024)
    assert (score.statistic.batch, score.statistic.sequence) == ("l2", "mean")
    assert (score.statistic.neurons, score.statistic.heads, score.depth) == ("post", "norm_last", None)
    prune = recipe.prune
    assert (prune.by, prune.scope, prune.iterations, prune.contiguous) == ("importance", "layer", 1, True)
    assert distill.steps(recipe.data.sequence) == 9961  # the papers' count


@pytest.mark.parametrize(("text", "tokens"), [("94e9", 94 * 10**9), ("1.5e3", 1500), ("7", 7)])
def test_counts_may_be_written_as_powers(recipe_file: Write, text: str, tokens: int) -> None:
    assert load_recipe(recipe_file(), [f"distill.tokens={text}"]).distill.tokens == tokens


def test_overrides_and_out(recipe_file: Write) -> None:
    recipe = load_recipe(recipe_file(), ["parallel.tp=2", "prune.layers=[0, 2]", "correct=null"], Path("elsewhere"))
    assert (recipe.parallel.tp, recipe.prune.layers, recipe.correct) == (2, (0, 2), None)
    assert recipe.out == Path("elsewhere")


def test_the_loss_is_the_papers_unless_said_otherwise(recipe_file: Write) -> None:
    assert load_recipe(recipe_file()).distill.loss == KDLoss("forward_kl", temperature=1.0, ce_weight=0.0)
    said = ["distill.loss={divergence: jsd, beta: 0.3, temperature: 2, top_k: 100, ce_weight: 0.5, budget_mib: 3}"]
    assert load_recipe(recipe_file(), said).distill.loss == KDLoss("jsd", 0.3, 2.0, 100, 0.5, 3)


def test_an_override_changes_one_block_of_those_that_an_alias_shares(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nout: o\ndata: {sources: [{path: x}]}\nprune: {}\ncorrect: &t {lr: 0.5}\ndistill: *t\n")
    recipe = load_recipe(path, ["distill.lr=0.25"])
    assert recipe.correct is not None
    assert (recipe.correct.lr, recipe.distill.lr) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["prune.hiden=3"], "prune.hiden is not a known key. Did you mean 'hidden'?"),
        (["data.sources=[{path: x, wieght: 2}]"], "data.sources.0.wieght is not a known key. Did you mean 'weight'?"),
        (["corect.tokens=3"], "corect is not a known key. Did you mean 'correct'?"),
        (["score.statistic.batch=l3"], "score.statistic.batch is 'l3'"),
        (["distill.lr=-1"], "distill.lr is -1"),
        (["distill.tokens=1.5"], "distill.tokens is 1.5"),
        (
            ["distill.loss.divergence=reverse_k"],
            "divergence 'reverse_k' is not known. Did you mean 'reverse_kl'? Known: ",
        ),
        (["distill.loss={divergence: mse, beta: 0.5}"], "divergence 'mse' has no beta. Leave beta out."),
        (["distill.loss.top_k=0"], "distill.loss.top_k is 0"),
        (["distill.loss.tempreature=2"], "distill.loss.tempreature is not a known key. Did you mean 'temperature'?"),
        (["data.sources=[]"], "data.sources"),
        (
            ["prune.layers=abc"],
            "prune.layers is 'abc': give the number of layers to keep, or a list of",
        ),
        (["prune.layers=0"], "prune.layers is 0: give the number"),
        (["prune.layers=[1, x]"], "prune.layers is [1, 'x']: give the number"),
        (["score.depth={metrik: kl}"], "score.depth.metrik is not a known key. Did you mean 'metric'?"),
        (["data=null"], "data is null: give a block of keys"),
        (["spec=ta"], "spec is 'ta'"),
        (["spec=te", "distill.states={outputs: ['3:2']}"], "set spec to local, or give only distill"),
        (["prune.hidden"], "does not have the form a.b=value"),
        (["out.x=1"], "--set 'out.x=1': the parent of x is a value, not a block of keys. Correct the key."),
        (["data.sources.1.weight=2"], "--set 'data.sources.1.weight=2': the list has no entry 1. Use 0 to 0."),
        (["data.sources.path=x"], "--set 'data.sources.path=x': the list has no entry path. Use 0 to 0."),
        (["prune.hidden=[1"], "is not a YAML value"),
    ],
)
def test_a_wrong_key_or_value_is_named(recipe_file: Write, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(), overrides)
    assert said in str(caught.value)


def test_a_number_in_a_key_is_a_place_in_a_list(recipe_file: Write) -> None:
    recipe = load_recipe(recipe_file(), ["data.sources.0.weight=2.5", "data.sources.0.validation=0.3"])
    assert (recipe.data.sources[0].weight, recipe.data.sources[0].validation) == (2.5, 0.3)
    assert recipe.data.sources[0].path == load_recipe(recipe_file()).data.sources[0].path
    assert recipe_with(recipe, {"data.sources.0.weight": 3.0}).data.sources[0].weight == 3.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["distill.learning_rate=1"], "distill.learning_rate is not a known key. Did you mean 'lr'?"),
        (["data.seq_length=8"], "data.seq_length is not a known key. Did you mean 'sequence'?"),
        (["parallel.tensor_model_parallel_size=2"], "Did you mean 'tp'?"),
        (["distill.batch_size=8"], "Did you mean 'global_batch' or 'micro_batch'?"),
        (["prune.num_layers=2"], "Did you mean 'layers'?"),
        (["teacher=x"], "teacher is not a known key. Did you mean 'model'?"),
        (["lr=1"], "lr is not a known key. Did you mean 'correct.lr' or 'search.light.lr' or 'distill.lr'?"),
        (["data.sources=[{file: x}]"], "data.sources.0.file is not a known key. Did you mean 'path'?"),
        (["quite.another=1"], "quite is not a known key."),
    ],
)
def test_the_words_of_other_tools_are_understood(recipe_file: Write, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(), overrides)
    assert said in str(caught.value)


def test_an_error_about_an_argument_names_the_key_that_sets_it(material: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Set data\.text_key to the right key"), with_keys_in_errors():
        prepare([material / "corpus.jsonl"], material / "model", tmp_path / "out", text_key="body")


@pytest.mark.parametrize(
    ("text", "block", "said"),
    [
        ("another pair, by `validation`", "", "another pair, by data.sources[].validation"),
        ("tries `hidden` 80", "search", "tries search.hidden 80"),
        ("tries `hidden` 80", "", "tries `hidden` 80"),  # prune.hidden or search.hidden
        ("run `pip` on `data/truncate`, not truncate", "", "run `pip` on `data/truncate`, not truncate"),
    ],
)
def test_an_argument_becomes_a_key_where_only_one_is_meant(text: str, block: str, said: str) -> None:
    assert with_keys(text, block) == said


@pytest.mark.parametrize(
    "override",
    [
        *(f"distill.lr={value}" for value in (".inf", "-.inf", ".nan", "inf", "nan", "1e999", "true", "[1]", "null")),
        *(f"distill.lr={value}" for value in ("1e300", "1e-300", 10**40, "'1e39'")),
        *("distill.loss={temperature: 1e-39}", "distill.loss={ce_weight: 1e39}"),
        *("distill.phases=[{tokens: 512, weights: [1e300]}]",),
        *(f"seed={value}" for value in (-1, 2**32, "true", "1.5", "x", 10**30)),
        *(f"prune.hidden={value}" for value in ("true", "0", "-3", "1e30", ".inf", "{a: 1}")),
        *(f"out={value}" for value in ('""', "true", "no", "3", '"a\\0b"', "[x]", "/".join(["x" * 300]), "x/" * 3000)),
        *(f"data.sources=[{{path: x, validation: {value}}}]" for value in ("0", "1", "-0.1", "true", ".nan", "[x]")),
        *("parallel.tp=true", "distill.save_async=1", "distill.save_async=maybe", "parallel.sequence_parallel=0"),
        *("score.depth={lengths: [true]}", "search={budget: {params: true}}", "search={budget: {params: .nan}}"),
        *("bench.batches=[true]", "prune.layers=[true]", "prune.layers=true", "prune.layers=[-1]", "prune.layers=[]"),
        *("data.text_key=true", "data.separator=''", "data.workers=1e6", "prune.iterations=1e9", "hang_seconds=1e-9"),
        *('data.text_key="\\ud83d"', "search={budget: {params: 1}, ffn: {from: 1, to: 1e12, step: 1}}"),
        *("search={budget: {params: [3, 1]}}", f"distill.tokens={'9' * 5000}", f"seed={'[' * 3000}"),
    ],
    ids=lambda override: override[:40],
)
def test_absurd_values_are_refused_by_name(recipe_file: Write, override: str) -> None:
    """Values of a wrong type or out of range are refused: booleans are not numbers, and numbers are finite."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(), [override])
    assert override.partition("=")[0].partition(".")[0] in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: a\nmodel: b\n", "the key 'model' is given twice"),
        ("out: &a [*a]\n", "values"),
        (
            "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]),
            "values",
        ),
        ("a: !!python/object/apply:os.system [ls]\n", "not YAML"),
        ("a: !!timestamp 2024-13-45\n", "not YAML"),
        ("1: 2\n", "the key 1, which is not text"),
        ("a: " + "[" * 5000, "deeply"),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_means_two_things_or_grows_without_bound_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml") as caught:
        load_recipe(path)
    assert said in str(caught.value)


def test_numbers_are_those_that_a_reader_sees(recipe_file: Write) -> None:
    """Unlike in YAML 1.1, 010 is not octal, 1:30 is not sexagesimal, and 1e-4 is a number."""
    recipe = load_recipe(recipe_file(), ["seed=010", "distill.lr=1e-4", "distill.tokens=1_000", "out=2024-01-02"])
    assert (recipe.seed, recipe.distill.lr, recipe.distill.tokens, str(recipe.out)) == (10, 1e-4, 1000, "2024-01-02")


def test_a_missing_key_is_named(recipe_file: Write) -> None:
    with pytest.raises(RecipeError, match=r"prune is missing"):
        load_recipe(recipe_file(prune=None))


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [", "\x00"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(path)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_is_frozen(recipe_file: Write) -> None:
    with pytest.raises(ValidationError):
        load_recipe(recipe_file()).seed = 2  # type: ignore[misc]


def test_every_key_has_its_help() -> None:
    schema = json_schema()
    kept = Path(package.__file__).with_name("schema.json")
    assert json.loads(kept.read_text()) == schema, "the keys have changed: run `make schema`"
    blocks = [schema, *schema["$defs"].values()]
    described = {"warmup_steps", "lr", "min_lr", "weight_decay", "micro_batch", "global_batch"}
    for block in blocks:
        for key, about in block.get("properties", {}).items():
            is_block = "$ref" in about or any("$ref" in choice for choice in about.get("anyOf", ()))
            assert is_block or about.get("description") or key in described | {"seed", "dtype", "samples"}, key
