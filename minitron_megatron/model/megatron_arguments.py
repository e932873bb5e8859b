"""Megatron-LM's arguments, as its checkpoints hold them -> ModelConfig: the inverse of `megatron_flags`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..errors import CheckpointError
from ..layout import Shape
from .config import ACTIVATIONS, ModelConfig
from .megatron_flags import RENAMED
from .megatron_names import ARGUMENTS, FACTOR, FUNCTIONS, LLAMA3, POSITIONS, SHAPE_NAMES, from_megatron
from .read_model import changed_settings, default_settings

__all__ = ["config_of_arguments"]

WORDS = {**RENAMED, "layernorm_epsilon": "norm_epsilon", "layernorm_zero_centered_gamma": "apply_layernorm_1p"}
"""mcore's name of a setting -> Megatron-LM's name of the argument, where they differ."""
OPTIONAL = {"window_size": None, "init_method_std": ModelConfig.init_std, "rotary_percent": 1.0}
"""Arguments that may be absent, and what they then mean."""
NORM = "LayerNorm"
Given = Mapping[str, Any]
"""Megatron-LM's arguments by name, of any type: a Namespace of its parser."""


def config_of_arguments(arguments: Given, vocab: int | None = None) -> ModelConfig:
    """Return the config of the model that Megatron-LM builds from its arguments.

    vocab: entries of the tokenizer, for arguments that do not say them. Raises CheckpointError, which names the
    argument, where one is missing, or where a ModelConfig cannot express it.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    mcore = SimpleNamespace(**_settings(given, vocab))
    shape = from_megatron({name: field for name, field in SHAPE_NAMES.items() if hasattr(mcore, name)}, mcore)
    if shape.get("experts"):
        shape["ffn"] = 0
    functions = from_megatron({name: field for name, field in FUNCTIONS.items() if hasattr(mcore, name)}, mcore)
    others = from_megatron(ARGUMENTS, mcore)
    sizes = {name: others.pop(name) for name in ("vocab", "tied")}
    config = ModelConfig(
        Shape(**shape, **sizes, norm_bias=mcore.normalization == NORM),
        **functions,
        **others,
        rotary_scaling=_rotary_scaling(given),
    )
    _refuse_unexpressed(given, config)
    return config


def _settings(given: Given, vocab: int | None) -> dict[str, object]:
    """Return mcore's name -> value of every setting in the table of names; in a dense model not those of experts."""
    experts = "num_experts" in given
    special = {
        "activation_func": ACTIVATIONS[_activation(given)],
        "share_embeddings_and_output_weights": not given.get("untie_embeddings_and_output_weights", False),
        "vocab_size": _vocabulary(given, vocab),
    }
    if not given.get("group_query_attention", False):
        special["num_query_groups"] = _required(given, "num_attention_heads")
    if experts:
        special["moe_ffn_hidden_size"] = given.get("moe_ffn_hidden_size", given.get("ffn_hidden_size"))
    found = {}
    for name in (*SHAPE_NAMES, *FUNCTIONS, *ARGUMENTS):
        word = WORDS.get(name, name)
        if name in special:
            found[name] = special[name]
        elif name in OPTIONAL:
            found[name] = given.get(word, OPTIONAL[name])
        elif "moe_" in name and (not experts or word not in given):
            continue  # a dense model, or an argument that this version of Megatron-LM does not have
        else:
            found[name] = _required(given, word)
    return found


def _required(given: Given, word: str) -> Any:
    if word not in given:
        raise CheckpointError(f"the checkpoint's arguments do not say {word}. Save it with Megatron-LM 0.8 or later.")
    return given[word]


def _activation(given: Given) -> str:
    if given.get("swiglu"):
        return "silu"
    if given.get("squared_relu"):
        return "relu2"
    raise _inexpressible("an activation other than --swiglu and --squared-relu")


def _vocabulary(given: Given, vocab: int | None) -> int:
    """Return the vocabulary without padding."""
    found = given.get("vocab_size", vocab)
    if found is None:
        raise CheckpointError(
            "the checkpoint's arguments do not say how many entries the tokenizer has. Give the Hugging Face folder of "
            "its tokenizer as `tokenizer`."
        )
    return int(found)


def _rotary_scaling(given: Given) -> dict[str, object] | None:
    if given.get("use_rope_scaling"):
        factor = float(_required(given, "rope_scaling_factor"))
        if factor != FACTOR:
            warnings.warn(
                f"the checkpoint's arguments say rope_scaling_factor: {factor:g}, which is used here. Megatron-LM's "
                f"pretrain_gpt.py ignores it: if that trained the checkpoint, it was with {FACTOR:g}.",
                stacklevel=2,
            )
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    factor = given.get("rotary_seq_len_interpolation_factor", 1)
    return {"rope_type": "linear", "factor": float(factor)} if factor != 1 else None


def _refuse_unexpressed(given: Given, config: ModelConfig) -> None:
    """Raise CheckpointError for an argument by which Megatron-LM would compute something else than `config`."""
    positions = given.get("position_embedding_type")
    if positions != POSITIONS["position_embedding_type"] and not given.get("use_rotary_position_embeddings"):
        raise _inexpressible(f"position_embedding_type={positions!r}")
    wanted = {n: v for n, v in default_settings(config).items() if n not in SHAPE_NAMES and n not in FUNCTIONS}
    found = {name: given.get(WORDS.get(name, name), value) for name, value in wanted.items()}
    for name, value, ours in changed_settings(found, wanted, config):
        raise _inexpressible(f"{WORDS.get(name, name)}={value!r} (here it would be {ours!r})")


def _inexpressible(what: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint's model has {what}, which this package cannot express.")
