"""Keys of a Hugging Face `config.json` and their allowed values.

Keys are read (READ), restricted to supported values (ONLY), or change nothing (FREE, DROPPED). `families.py` adds each
family's own keys. `tests/convert` compares these tables with transformers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..model import HfConfig

__all__ = ["DEFAULTS", "DERIVED", "DROPPED", "FREE", "ONLY", "READ", "HfConfig", "Kind", "Only", "free"]

LARGEST, DEEPEST = 2**22, 10_000
"""Largest size of an axis and largest number of layers that a config may have."""

Only = Mapping[str, tuple[object, ...]]
"""Key -> its supported values. transformers' default of an absent key is one of them."""


@dataclass(frozen=True)
class Kind:
    """Kind of values that a key may have."""

    words: str
    """Description of the allowed values, in words that complete "is not ..."."""
    holds: Callable[[object], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.words} or {other.words}", lambda value: self.holds(value) or other.holds(value))


def _whole(least: int, most: int) -> Kind:
    return Kind(
        f"a whole number from {least} to {most:,}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
    )


def _number(words: str, holds: Callable[[float], bool]) -> Kind:
    def fits(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
            return False  # a Python integer may exceed the range of floats
        return math.isfinite(value) and holds(value)

    return Kind(words, fits)


ANY = Kind("anything", lambda value: True)
NULL = Kind("null", lambda value: value is None)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
SIZE, LAYERS, NATURAL = _whole(1, LARGEST), _whole(1, DEEPEST), _whole(0, 2**31 - 1)
POSITIVE = _number("a number above 0", lambda value: value > 0)
SHARE = _number("a number above 0 and at most 1", lambda value: 0 < value <= 1)
PROBABILITY = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)
EPSILON = Kind(
    "a fraction above 0 and below 1", lambda value: isinstance(value, float) and 0 < value < 1 and value > 1e-30
)
DEVIATION = Kind("a fraction from 0 to 1", lambda value: isinstance(value, float) and 0 <= value <= 1)
NUMBER = _number("a number >= 0", lambda value: value >= 0)
DECIMAL = Kind("a number >= 0 with a decimal point", lambda value: isinstance(value, float) and NUMBER.holds(value))
ID = _whole(-1, 2**31 - 1)
QUANTISER = Kind("an object with a quant_method", lambda value: isinstance(value, dict) and "quant_method" in value)
TEXTS = Kind(
    "a list of strings", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value)
)
IDS = Kind("a list of whole numbers", lambda value: isinstance(value, list) and all(map(ID.holds, value)))
DTYPES = ("float32", "bfloat16", "float16", "float64")
DTYPE = Kind(f"one of {', '.join(DTYPES)}", lambda value: isinstance(value, str) and value in DTYPES)
KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
KERNEL = Kind(f"one of {', '.join(KERNELS)}", lambda value: isinstance(value, str) and value in KERNELS)
WINDOW = SIZE | NULL
LAYER_TYPES = NULL | Kind(
    "a list of full_attention and sliding_attention",
    lambda value: isinstance(value, list) and all(each in ("full_attention", "sliding_attention") for each in value),
)

READ: Mapping[str, Kind] = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "max_position_embeddings": SIZE,
    "rms_norm_eps": EPSILON,
    "norm_eps": EPSILON,
    "initializer_range": DEVIATION,
    "tie_word_embeddings": FLAG,
    "original_max_position_embeddings": SIZE,
    "rope_theta": POSITIVE,
    "rope_parameters": OBJECT | NULL,
    "rope_scaling": OBJECT | NULL,
}
"""Keys that are read in every family that has them."""

DERIVED: Mapping[str, Callable[[HfConfig], object]] = {
    "num_key_value_heads": lambda hf: hf["num_attention_heads"],
    "head_dim": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
}
"""Defaults computed from other keys, for an absent key, and for null where the family allows null."""

DEFAULTS: Mapping[str, object] = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "original_max_position_embeddings": None,
    "sliding_window": None,
    "layer_types": None,
}
"""transformers' defaults of absent keys. A key without a default here or in its family's row is required."""

ONLY: Only = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "partial_rotary_factor": (1.0, 1),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
    "torchscript": (False,),
    "return_dict": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}

DROPPED: Mapping[str, tuple[Kind, str]] = {
    "quantization_config": (QUANTISER | NULL, "the weights are exported unquantised"),
    "auto_map": (OBJECT, "code in a model's folder is neither run nor copied"),
}
"""Keys that hold only for the source folder's files and are not exported, each with its kind and reason."""


def free(reason: str, kind: Kind, keys: str | Iterable[str]) -> dict[str, tuple[Kind, str]]:
    """Return entries for keys that change nothing, all of one kind and for one reason."""
    return dict.fromkeys(keys.split() if isinstance(keys, str) else keys, (kind, reason))


FREE: Mapping[str, tuple[Kind, str]] = {
    **free("model_type already determines the class", TEXTS | NULL, "architectures"),
    **free("it selects the family", TEXT, "model_type"),
    **free("dropout acts only in training with transformers; here there is none", PROBABILITY,
           "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop classifier_dropout"),
    **free("a KV cache does not change the results", FLAG, "use_cache"),
    **free("stored dtype; the weight files say it themselves", DTYPE | NULL, "torch_dtype dtype"),
    **free("says which software wrote it", TEXT | NULL,
           "transformers_version _name_or_path name_or_path _commit_hash unsloth_version"),
    **free("says which software wrote it", ANY, "transformers.js_config unsloth_fixed unsloth_fixed_mistral"),
    **free("ids of special tokens are used by tokenizers and generation only", ID | IDS | NULL,
           "eos_token_id"),
    **free("ids of special tokens are used by tokenizers and generation only", ID | NULL,
           "bos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id"),
    **free("the tokenizer is read from its own files", TEXT | NULL, "tokenizer_class"),
    **free("selects the attention kernel", KERNEL | NULL, "attn_implementation _attn_implementation"),
    **free("selects the attention kernel", FLAG, "_attn_implementation_autoset use_sdpa use_flash_attn"),
    **free("splits matrix products without changing them", _whole(1, 1024), "pretraining_tp"),
    **free("only for classification heads", OBJECT | NULL, "id2label label2id"),
    **free("only for classification heads", _whole(1, LARGEST) | NULL, "num_labels"),
    **free("only for classification heads", TEXT | NULL, "finetuning_task"),
    **free("only for classification heads", NULL, "problem_type"),
    **free("no family here reads it", FLAG, "is_decoder use_bfloat16 tf_legacy_loss is_llama_config"),
    **free("no family here reads it", SIZE | NULL, "max_sequence_length model_max_length"),
    **free("no family here reads it", ANY, "task_specific_params prefix"),
    **free("a key of generation, read from generation_config.json", ANY, (
        "max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups "
        "diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty "
        "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids "
        "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    )),
}  # fmt: skip
"""Key -> its kind, and why it does not change what the model computes."""
