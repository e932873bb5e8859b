"""Answers to single requests are those of lm-eval's own Hugging Face model: tokenizers x requests x settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from minitron_megatron.convert import load_hf
from minitron_megatron.data import end_of_document, load_tokenizer, transformers_tokenizer
from minitron_megatron.errors import DataError
from minitron_megatron.evaluate import Predictor
from minitron_megatron.evaluate.decoding import generation_settings
from minitron_megatron.evaluate.harness import harness_model
from minitron_megatron.layout import Shape
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.tiny import write_llama

CONTEXT = 48
SHAPE = Shape(layers=2, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=288)
SPECIAL = ["<end>", "<s>", "<|im_end|>", "<|eot|>"]
MERGES = [("Ġ", "a"), ("b", "c"), ("Ġa", "bc"), ("Ċ", "Ċ")]

Request = tuple[str, tuple[Any, ...]]


def write_tokenizer(folder: Path, template: str | None, bos: str | None) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *letters, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, MERGES))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if template:
        named = [(word, SPECIAL.index(word)) for word in SPECIAL[:2]]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v}))


TOKENIZERS = {
    "none": (None, None),
    "bos": ("<s> $A", "<s>"),
    "eos": ("$A <end>", None),
    "both": ("<s> $A <end>", "<s>"),
    "bos-not-added": (None, "<s>"),
}
SETTINGS: dict[str, dict[str, Any] | None] = {
    "config.json": None,
    "one end": {"eos_token_id": 40},
    "several ends": {"eos_token_id": [0, 2, 3, *range(20, 60)], "do_sample": True, "temperature": 0.6, "top_k": 20},
    "no end": {"max_length": 4096},
    "penalties": {"eos_token_id": [0, 30], "repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
    "lengths": {"eos_token_id": list(range(0, 288, 2)), "min_new_tokens": 3, "max_new_tokens": 6},
    "suppressed": {
        "eos_token_id": list(range(0, 288, 3)),
        "min_length": 9,
        "suppress_tokens": [5, 7, *range(100, 200)],
    },
}
PAIRS: list[Request] = [
    ("loglikelihood", pair)
    for pair in (
        ("", "abc"),
        ("", "<end> a"),
        ("", "<s>ab"),
        ("a b ", "c"),
        ("a b", " abc d"),
        ("q:\n", "yes"),
        ("q:\n", "\nyes"),
        ("<s>c", "b"),
        ("<end>a", " b"),
        ("ü ", "ö"),
        ("x y " * 30, "zz"),
        ("x", "z" * (CONTEXT - 3)),
        ("same", " a"),
        ("same", " b"),
    )
]
ROLLING: list[Request] = [
    ("loglikelihood_rolling", (text,)) for text in ("", "a", "some words " * 20, "<s>a b", "<end>a", "abc" * 16)
]
HOW: list[dict[str, Any]] = [
    {"until": ["\n"], "max_gen_toks": 12},
    {"until": ["<|im_end|>", "<|eot|>"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7},
    {"until": "e", "max_gen_toks": 9},
    {"until": ["ab", "\n\n", "th"], "max_new_tokens": 12},
    {"until": [""], "max_gen_toks": 5},
    {"max_gen_toks": 11, "temperature": 0.0},
    {"until": ["q"], "max_gen_toks": 12, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
]
PROMPTS = ("q: what? a:", "<s>a b", "<end>a", "x y " * 30, "ü abc\n\n")
GENERATED: list[Request] = [("generate_until", (prompt, how)) for how in HOW for prompt in PROMPTS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("model"), SHAPE, 5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": CONTEXT, "eos_token_id": 0, "bos_token_id": None})
    )
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def variant(base: Path, folder: Path, kind: str, settings: dict[str, Any] | None = None) -> Path:
    for path in base.iterdir():
        (folder / path.name).hardlink_to(path)
    write_tokenizer(folder, *TOKENIZERS[kind])
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def instances(requests: Sequence[Request]) -> list[Any]:
    return [SimpleNamespace(args=args, request_type=kind, task_name="t") for kind, args in requests]


def megatron(topology: Topology, folder: Path, requests: list[Request], truncate: bool = True) -> list[Any]:
    predictor = Predictor(load_hf(folder, topology), topology, micro_batch=3)
    lm = harness_model(
        transformers_tokenizer(folder),
        end=end_of_document(folder, load_tokenizer(folder)),
        context=CONTEXT,
        vocab=SHAPE.vocab,
        settings=generation_settings(folder),
        predictor=predictor,
        truncate=truncate,
    )
    return list(getattr(lm, requests[0][0])(instances(requests)))


def reference(folder: Path, requests: list[Request]) -> list[Any]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return list(getattr(lm, requests[0][0])(instances(requests), disable_tqdm=True))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_likelihoods(pool: Pool, base: Path, tmp_path: Path, kind: str) -> None:
    """PAIRS holds no two pairs of equal tokens with different splits: the harness confuses those."""
    folder = variant(base, tmp_path, kind)
    (found,) = pool.run(megatron, folder, PAIRS)
    for (_, args), answer, right in zip(PAIRS, found, reference(folder, PAIRS), strict=True):
        assert answer == (pytest.approx(right[0], abs=1e-4), right[1]), args
    (found,) = pool.run(megatron, folder, ROLLING)
    assert found == pytest.approx(reference(folder, ROLLING), rel=1e-5)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_generation(pool: Pool, base: Path, tmp_path: Path, kind: str) -> None:
    """Every way to generate by one tokenizer; the others, which change the prompts, with a third of them."""
    folder = variant(base, tmp_path, kind, SETTINGS["several ends"])
    requests = GENERATED if kind == "none" else GENERATED[::3]
    (found,) = pool.run(megatron, folder, requests)
    assert found == reference(folder, requests)
    if kind == "none":
        assert len({len(each) for each in found}) > 5, "answers of many lengths: they end for many reasons"


@pytest.mark.parametrize("settings", [name for name in SETTINGS if name != "several ends"])
def test_generation_settings(pool: Pool, base: Path, tmp_path: Path, settings: str) -> None:
    folder = variant(base, tmp_path, "none", SETTINGS[settings])
    requests = GENERATED[: len(PROMPTS) * 2] + GENERATED[-len(PROMPTS) :]
    (found,) = pool.run(megatron, folder, requests)
    assert found == reference(folder, requests)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_several_ends_at_other_layouts(pool: Pool, base: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    settings = {"eos_token_id": [0, 2, *range(20, 60)], "repetition_penalty": 1.2}
    folder = variant(base, tmp_path, "bos", settings)
    truth = reference(folder, GENERATED[: len(PROMPTS)])
    for found in pool.run(megatron, folder, GENERATED[: len(PROMPTS)], **layout):
        assert found == truth


@pytest.mark.parametrize(
    ("settings", "request_", "message"),
    [
        ({}, PAIRS[10], r"a prompt of \d+ tokens is longer .*\. Use fewer shots, or set `truncate` to drop"),
        ({}, ("loglikelihood", ("a", "")), "the answer '' adds no tokens"),
        ({}, ("loglikelihood", ("", "")), "the answer '' adds no tokens"),
        (
            {},
            ("loglikelihood", ("a", "b" * 50)),
            r"^a continuation of 50 tokens is longer than the model's context of 48\. Leave the task out, or",
        ),
        ({}, ("loglikelihood", ("a", 3)), "an answer is 3, not a string"),
        ({}, ("generate_until", ("", HOW[0])), r"^a prompt has no tokens, so nothing can be .*\. Leave out its"),
        ({}, ("generate_until", ("a", {"max_gen_toks": 48})), "leaves no room for prompts"),
        ({}, ("generate_until", ("a", {"max_gen_toks": 4, "stop": "x"})), "hold stop, which"),
        ({"num_beams": 4}, ("generate_until", ("a", HOW[0])), "sets num_beams to 4, which is not supported"),
        ({"stop_strings": ["x"]}, ("generate_until", ("a", HOW[0])), "sets stop_strings"),
        ({"eos_token_id": "<end>"}, ("generate_until", ("a", HOW[0])), "eos_token_id is '<end>'"),
        ({"repetition_penalty": "1"}, ("generate_until", ("a", HOW[0])), "repetition_penalty is '1'"),
    ],
)
def test_what_cannot_be_answered_is_one_message(
    pool: Pool, base: Path, tmp_path: Path, settings: dict[str, Any], request_: Request, message: str
) -> None:
    folder = variant(base, tmp_path, "none", settings)
    with pytest.raises(DataError, match=message):
        pool.run(megatron, folder, [request_], False)


def test_a_token_beyond_the_embedding_is_named(pool: Pool, base: Path, tmp_path: Path) -> None:
    folder = variant(base, tmp_path, "none")
    read = json.loads((folder / "tokenizer.json").read_text())
    known = len(SPECIAL) + 256 + len(MERGES)
    new = {at: "<new>" if at == 288 else f"<new{at}>" for at in range(known, 289)}
    read["added_tokens"] += [{**read["added_tokens"][0], "id": at, "content": word} for at, word in new.items()]
    (folder / "tokenizer.json").write_text(json.dumps(read))
    assert pool.run(megatron, folder, [PAIRS[3]])
    for request in (("loglikelihood", ("a", "<new>")), ("loglikelihood_rolling", ("<new>",))):
        with pytest.raises(DataError, match=r"the token '<new>', whose id is 288, but the model has 288 embeddings"):
            pool.run(megatron, folder, [request])


def test_a_tokenizer_without_an_end_has_that_of_config_json(pool: Pool, base: Path, tmp_path: Path) -> None:
    """A tokenizer without a named end token uses the corpus's end-of-document token."""
    (tmp_path / "named").mkdir()
    (tmp_path / "unnamed").mkdir()
    named, unnamed = variant(base, tmp_path / "named", "none"), variant(base, tmp_path / "unnamed", "none")
    (unnamed / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for requests in (PAIRS, ROLLING, GENERATED[:7]):
        assert pool.run(megatron, unnamed, requests) == pool.run(megatron, named, requests)
