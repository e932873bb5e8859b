"""Check every family x every config key of transformers 4.57 and 5 (and some other keys) x typical, boundary and wrong
values, constants inside rope parameters, and random pairs of keys: the logits equal those of the installed version of
transformers, or a MinitronError names the key. Prints a line for each variant that does neither, and the counts.

    python tests/compat/configs.py [--sample N] [FAMILY ...]        --sample: only every Nth variant
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

TOLERANCE = 1e-4
"""Tolerance relative to the largest logit."""
TOKENS = torch.arange(2, 66).view(2, 32)
GONE = object()
"""Marks a key that is removed."""

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.1,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "use_cache": True,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500.0},
    "mistral": {"rope_theta": 500.0, "sliding_window": None},
    "qwen2": {"rope_theta": 500.0},
    "qwen3": {"rope_theta": 500.0},
    "phi3": {"rope_theta": 500.0, "sliding_window": None},
    "mixtral": {"rope_theta": 500.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MIXTURE, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {**MIXTURE, "norm_topk_prob": True},
    "nemotron": {"rope_theta": 500.0},
}

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
ANY_KIND: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    0.5,
    10**9,
    float("nan"),
    float("inf"),
    "4",
    "",
    [],
    [1],
    {},
]
BY_KEY: Mapping[str, list[Any]] = {
    "rope_theta": [1e4, 10000, 1e6, 1.0, -5.0, 1e300],
    "partial_rotary_factor": [0.25, 0.3, 0.75, 1.0, 1.5, 0.01],
    "original_max_position_embeddings": [16, 64, 4096],
    "rope_scaling": [
        {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2}, {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0.5}, {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": "2"},
        {"type": "linear", "rope_type": "default", "factor": 2.0}, {"factor": 2.0}, {"rope_type": "default"},
        {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}, {"type": "su"},
        {"rope_type": None},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}, {"rope_type": "default", "rope_theta": None},
        {"rope_type": "default", "partial_rotary_factor": 0.5}, {"rope_type": "linear", "factor": 2.0, "beta": 3},
        {"mrope_section": [1, 1, 2], "rope_type": "default"}, {"rope_type": ["default"]},
        {"rope_type": "default", "factor": 4.0},
        LLAMA3, {**LLAMA3, "factor": 1.0}, {**LLAMA3, "low_freq_factor": 4.0}, {**LLAMA3, "high_freq_factor": 0.5},
        {**LLAMA3, "low_freq_factor": 0}, {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
        {k: v for k, v in LLAMA3.items() if k != "factor"}, {**LLAMA3, "original_max_position_embeddings": 32},
        {**LLAMA3, "original_max_position_embeddings": None}, {**LLAMA3, "factor": float("nan")}, "linear", [1, 2],
    ],
    "hidden_act": ["silu", "swish", "relu2", "gelu", "relu", "gelu_new"],
    "sliding_window": [1, 2, 8, 31, 32, 33, 64, 4096],
    "use_sliding_window": [True],
    "max_window_layers": [0, 1, 2, 28],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"],
                    ["full_attention"], ["full_attention"] * 3, ["chunked_attention"] * 2, ["full"] * 2],
    "mlp_only_layers": [[0], [7]],
    "rms_norm_eps": [1e-5, 1e-6, 0.1, 0.0, 1e-40, -1e-6],
    "norm_eps": [1e-5, 1e-6, 0.1, 0.0, -1e-6],
    "torch_dtype": ["float32", "bfloat16", "int8", "float8_e4m3fn", "banana"],
    "dtype": ["float32", "bfloat16", "banana"],
    "num_hidden_layers": [3], "num_attention_heads": [8, 3], "num_key_value_heads": [4, 3], "head_dim": [16, 7],
    "hidden_size": [64, 33], "vocab_size": [97, 95], "intermediate_size": [64], "num_experts": [5, 3],
    "num_local_experts": [4, 5, 3], "num_experts_per_tok": [3, 4, 5], "moe_intermediate_size": [23],
    "max_position_embeddings": [8, 32, 131072], "initializer_range": [0.02], "attention_dropout": [0.1],
    "eos_token_id": [[1, 2]], "pad_token_id": [95, 96, 4000], "architectures": [["LlamaForCausalLM"], ["X"]],
    "decoder_sparse_step": [1], "pretraining_tp": [1], "attn_implementation": ["eager", "sdpa"],
    "auto_map": [{"AutoConfig": "configuration_x.X"}], "transformers_version": ["4.31.0"], "return_dict": [True],
}  # fmt: skip
FOREIGN = (
    "num_beams", "num_return_sequences", "early_stopping", "do_sample", "torchscript", "pruned_heads", "rope_theta",
    "rope_parameters", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings", "attention_bias",
    "mlp_bias", "qkv_bias", "norm_topk_prob", "sliding_window", "use_sliding_window", "layer_types", "head_dim",
    "num_experts", "num_local_experts", "rms_norm_eps", "norm_eps", "is_causal", "per_layer_config",
    "attention_chunk_size", "num_key_value_head", "n_layer", "rope_interleaved", "embedding_multiplier",
    "logit_scale", "final_logit_softcapping", "clip_qkv", "query_pre_attn_scalar", "num_nextn_predict_layers",
    "tie_last_hidden_states", "transformers_weights", "torch_dtype", "dtype", "auto_map", "no_rope_layers",
    "attn_implementation", "quantization_config", "text_config", "max_length", "top_k", "temperature", "is_decoder",
    "use_mrope", "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "output_scores", "prefix", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_p", "typical_p", "use_bfloat16",
)  # fmt: skip
"""Keys that a family may lack in the installed version of transformers, but has in the other one, or elsewhere."""
PAIRS = 400
"""Random pairs of a family's variants."""


VERSION = int(transformers.__version__.split(".")[0])
OTHER_IN_4 = ("rope_parameters", "tie_word_embeddings")
"""Keys that 4.x ignores, or reads only with an untied output layer; we read them as 5.x does."""


@dataclass(frozen=True)
class Variant:
    family: str
    key: str
    value: Any
    beside: tuple[tuple[str, Any], ...] = ()
    """Key -> other keys that change with it."""

    def __str__(self) -> str:
        keys = ((self.key, self.value), *self.beside)
        shown = (f"{key}: {'gone' if value is GONE else repr(value)[:200]}" for key, value in keys)
        return f"{self.family} {', '.join(shown)}"

    def config(self, source: Mapping[str, Any]) -> dict[str, Any]:
        changed = {**source, **dict(self.beside), self.key: self.value}
        return {key: value for key, value in changed.items() if value is not GONE}


def make(family: str, folder: Path) -> Mapping[str, Any]:
    """Make a model with weights large enough to affect the logits, and its config in the flat form of 4.x."""
    torch.manual_seed(7)
    said = {**SIZES, **FAMILIES[family]}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **said))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + (1.0 if weight.dim() == 1 else 0.0))
    model.save_pretrained(folder)
    flat = json.loads((folder / "config.json").read_text())
    nested = flat.pop("rope_parameters", None) or {}
    flat.setdefault("rope_theta", nested.get("rope_theta", 10000.0))
    if nested.get("partial_rotary_factor", 1.0) != 1.0:
        flat["partial_rotary_factor"] = nested["partial_rotary_factor"]
    (folder / "config.json").write_text(json.dumps(flat))
    return flat


def variants(family: str, flat: Mapping[str, Any]) -> Iterator[Variant]:
    own = transformers.AutoConfig.for_model(family).to_dict()
    for key in dict.fromkeys([*own, *flat, *FOREIGN]):
        if VERSION == 4 and key in OTHER_IN_4:
            continue
        if key in flat:
            yield Variant(family, key, GONE)
        known = BY_KEY.get("rope_scaling" if key == "rope_parameters" else key, [])
        typical = [own[key]] if own.get(key) is not None and key != "rope_parameters" else []
        seen: list[Any] = []
        for value in [*known, *typical, *ANY_KIND]:
            if not any(type(value) is type(each) and repr(value) == repr(each) for each in seen):
                seen.append(value)
                yield Variant(family, key, value)
    for variant in (*together(family), *nested(family), *pairs(family, own, flat)):
        if VERSION > 4 or not {variant.key, *(key for key, _ in variant.beside)} & {*OTHER_IN_4}:
            yield variant


def pairs(family: str, own: Mapping[str, Any], flat: Mapping[str, Any]) -> Iterator[Variant]:
    """Return random pairs of typical and boundary values of two keys, or of a value and an absent key."""
    pick = random.Random(family)
    keys = [key for key in dict.fromkeys([*own, *flat, *FOREIGN]) if key in BY_KEY and key != "quantization_config"]
    for _ in range(PAIRS):
        first, second = pick.sample(keys, 2)
        gone = [GONE] if second in flat else []
        other = pick.choice([*BY_KEY[second], *gone, *gone])
        yield Variant(family, first, pick.choice(BY_KEY[first]), ((second, other),))


def nested(family: str) -> Iterator[Variant]:
    """Return rope parameters with one constant changed, added or absent."""
    added = ["type", "original_max_position_embeddings", "attention_factor", "mrope_section", "full_attention"]
    if VERSION > 4:
        added += ["rope_theta", "partial_rotary_factor"]  # 4.x does not read these here
    absent = (("rope_theta", GONE), ("partial_rotary_factor", GONE))
    for form, beside in (("rope_scaling", ()), ("rope_parameters", absent)):
        for constants in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, LLAMA3):
            for key in dict.fromkeys([*constants, *added]):
                for value in [GONE, *BY_KEY.get(key, []), "linear", *ANY_KIND]:
                    changed = {**constants, key: value}
                    kept = {name: each for name, each in changed.items() if each is not GONE}
                    yield Variant(family, form, kept, beside)


def together(family: str) -> Iterator[Variant]:
    """Return combinations of keys that interact."""
    linear = {"rope_type": "linear", "factor": 2.0}
    yield Variant(family, "rope_scaling", linear, (("rope_parameters", {"rope_type": "default"}),))
    yield Variant(family, "rope_scaling", linear, (("rope_parameters", linear),))
    yield Variant(family, "rope_parameters", {"rope_type": "default", "rope_theta": 700.0})
    yield Variant(family, "rope_parameters", {"rope_type": "default", "rope_theta": 700.0}, (("rope_theta", GONE),))
    for nested in (16, 32):
        scaling = {**LLAMA3, "original_max_position_embeddings": nested}
        yield Variant(family, "rope_scaling", scaling, (("original_max_position_embeddings", 16),))
    absent = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    yield Variant(family, "rope_scaling", absent, (("original_max_position_embeddings", 16),))
    yield Variant(family, "partial_rotary_factor", 0.5, (("rope_scaling", linear),))
    half = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    yield Variant(family, "rope_parameters", half, (("rope_theta", GONE), ("partial_rotary_factor", GONE)))
    yield Variant(family, "rope_parameters", half, (("partial_rotary_factor", 0.25),))
    for width in (0, 8, 32):
        for first in (0, 1, 2):
            on = (("use_sliding_window", True), ("max_window_layers", first), ("layer_types", GONE))
            yield Variant(family, "sliding_window", width, on)
    yield Variant(family, "tie_word_embeddings", True)
    yield Variant(family, "num_experts", 4, (("num_local_experts", 5),))
    yield Variant(family, "norm_topk_prob", False, (("num_experts_per_tok", 1),))
    yield Variant(family, "norm_topk_prob", True, (("num_experts_per_tok", 1),))


# ---- results on a folder


def of_transformers(folder: Path) -> Tensor | str:
    """Return transformers' logits, or its error."""
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        if loaded["missing_keys"]:
            return f"random {sorted(loaded['missing_keys'])[0]}"
        with torch.no_grad():
            return model.eval()(TOKENS).logits.float()
    except Exception as error:  # any error counts
        return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"


def of_ours(folder: Path, topology: Any, known: dict[str, Tensor]) -> Tensor | str:
    """Return our logits, or the message of a MinitronError. Other errors are raised.

    known: results by what was read from the config; the weights stay the same.
    """
    from minitron_megatron.convert import load_hf, read_config
    from minitron_megatron.convert.check import logits_of
    from minitron_megatron.data import Batch
    from minitron_megatron.errors import MinitronError

    try:
        read = repr(replace(read_config(folder), source={}))
        if read not in known:
            logits = logits_of(load_hf(folder, topology), Batch(TOKENS, TOKENS, TOKENS >= 0), topology)
            assert logits is not None
            known[read] = logits
    except MinitronError as error:
        return str(error)
    return known[read]


def outcome(variant: Variant, ours: Tensor | str, theirs: Tensor | str) -> str:
    """Return `equal`, `refused`, or a description of the problem."""
    if isinstance(ours, str):
        named = [variant.key, *(key for key, _ in variant.beside)]
        values = [variant.value, *(value for _, value in variant.beside)]
        nested = [key for value in values if isinstance(value, dict) for key in value]
        return "refused" if any(str(key) in ours for key in [*named, *nested]) else f"UNNAMED {ours}"
    if isinstance(theirs, str):
        if VERSION == 4:
            return "5.x-alone"  # 4.x fails here: the sweep with 5.x checks it
        return f"READ where transformers fails: {theirs}"
    if not torch.isfinite(theirs).all():
        return "READ where transformers' logits are not finite"
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    return "equal" if apart < TOLERANCE else f"OTHER logits by {apart:.1e}"


def check(variant: Variant, flat: Mapping[str, Any], folder: Path, topology: Any, known: dict[str, Tensor]) -> str:
    (folder / "config.json").write_text(json.dumps(variant.config(flat)))
    try:
        ours = of_ours(folder, topology, known)
    except Exception as error:  # unexpected errors
        return f"CRASH {type(error).__name__}: {str(error).splitlines()[:1]}"
    return (
        "refused"
        if isinstance(ours, str) and outcome(variant, ours, "") == "refused"
        else outcome(variant, ours, ours if isinstance(ours, str) else of_transformers(folder))
    )


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--sample", type=int, default=1)
    options.add_argument("families", nargs="*", default=list(FAMILIES))
    asked = options.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    from minitron_megatron.parallel import Topology

    topology, total = Topology.start(), Counter[str]()
    for family in asked.families or FAMILIES:
        counts, known = Counter[str](), dict[str, Tensor]()
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            flat = make(family, folder)
            assert load_file(folder / "model.safetensors")
            for variant in list(variants(family, flat))[:: asked.sample]:
                found = check(variant, flat, folder, topology, known)
                counts[found.split()[0]] += 1
                if found not in ("equal", "refused", "5.x-alone"):
                    print(f"{variant}  ->  {found}", flush=True)
        total += counts
        print(f"{family}: {dict(counts)}", flush=True)
    print(f"transformers {transformers.__version__}: {total.total()} variants, {dict(total)}")


if __name__ == "__main__":
    main()
