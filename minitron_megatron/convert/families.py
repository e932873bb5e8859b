"""The model families: what Hugging Face calls each parameter, and what makes a family different."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError, did_you_mean
from ..layout import Shape, lookup

__all__ = ["FAMILIES", "WHOLE", "Family", "family_of"]

WHOLE = ""
"""The role of a Hugging Face tensor that is all of a Megatron one."""

Names = Mapping[str, Mapping[str, str]]
"""Megatron pattern -> role -> Hugging Face pattern."""


Only = Mapping[str, tuple[Any, ...]]
"""Setting -> the values that are supported; the first is what an absent one means."""

LLAMA_ONLY: Only = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)}
NEMOTRON_ONLY: Only = {"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)}
QWEN_ONLY: Only = {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)}


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    model_type: str
    architecture: str
    names: Names
    shape: Mapping[str, Any] = field(default_factory=dict)
    """What its config does not say of `Shape`."""
    functions: Mapping[str, Any] = field(default_factory=dict)
    """What its config does not say of `ModelConfig`."""
    eps: str = "rms_norm_eps"
    """The config's key for the norm's epsilon."""
    rotary_share: float = 1.0
    """The share of each head that is rotated where its config does not say."""
    only: Only = field(default_factory=lambda: LLAMA_ONLY)
    """Settings that change the function."""

    def hf_names(self, name: str) -> dict[str, str]:
        """role -> Hugging Face tensor, for a parameter's global Megatron name."""
        parts = name.split(".")
        layer = parts[2] if name.startswith("decoder.layers.") else ""
        pattern = ".".join([*parts[:2], "*", *parts[3:]]) if layer else name
        return {role: hf.replace("*", layer) for role, hf in self.names[pattern].items()}

    def tensors(self, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every Hugging Face tensor of a shape with its own shape, in the order of the layers."""
        sizes = shape.sizes(padded=False)
        for name in shape.names():
            param = lookup(name)
            whole = param.shape(sizes)
            for role, hf in self.hf_names(name).items():
                yield hf, (len(param.role_rows(0, role, sizes)), *whole[1:]) if role != WHOLE else whole


HF_LAYER, LAYER = "model.layers.*.", "decoder.layers.*."
LLAMA_NAMES: Names = {
    "embedding.word_embeddings.weight": {WHOLE: "model.embed_tokens.weight"},
    LAYER + "input_layernorm.weight": {WHOLE: HF_LAYER + "input_layernorm.weight"},
    LAYER + "self_attention.linear_qkv.weight": {
        role: f"{HF_LAYER}self_attn.{role}_proj.weight" for role in ("q", "k", "v")
    },
    LAYER + "self_attention.linear_proj.weight": {WHOLE: HF_LAYER + "self_attn.o_proj.weight"},
    LAYER + "pre_mlp_layernorm.weight": {WHOLE: HF_LAYER + "post_attention_layernorm.weight"},
    LAYER + "mlp.linear_fc1.weight": {role: f"{HF_LAYER}mlp.{role}_proj.weight" for role in ("gate", "up")},
    LAYER + "mlp.linear_fc2.weight": {WHOLE: HF_LAYER + "mlp.down_proj.weight"},
    "decoder.final_layernorm.weight": {WHOLE: "model.norm.weight"},
    "output_layer.weight": {WHOLE: "lm_head.weight"},
}

QWEN2_NAMES: Names = {
    **LLAMA_NAMES,
    LAYER + "self_attention.linear_qkv.bias": {
        role: f"{HF_LAYER}self_attn.{role}_proj.bias" for role in ("q", "k", "v")
    },
}
QWEN3_NAMES: Names = {
    **LLAMA_NAMES,
    LAYER + "self_attention.q_layernorm.weight": {WHOLE: HF_LAYER + "self_attn.q_norm.weight"},
    LAYER + "self_attention.k_layernorm.weight": {WHOLE: HF_LAYER + "self_attn.k_norm.weight"},
}
NEMOTRON_NAMES: Names = {
    **LLAMA_NAMES,
    LAYER + "input_layernorm.bias": {WHOLE: HF_LAYER + "input_layernorm.bias"},
    LAYER + "pre_mlp_layernorm.bias": {WHOLE: HF_LAYER + "post_attention_layernorm.bias"},
    LAYER + "mlp.linear_fc1.weight": {"up": HF_LAYER + "mlp.up_proj.weight"},
    "decoder.final_layernorm.bias": {WHOLE: "model.norm.bias"},
}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", LLAMA_NAMES),
        Family("mistral", "MistralForCausalLM", LLAMA_NAMES),
        Family("qwen2", "Qwen2ForCausalLM", QWEN2_NAMES, {"qkv_bias": True}, only=QWEN_ONLY),
        Family("qwen3", "Qwen3ForCausalLM", QWEN3_NAMES, {"qk_norm": True}, only=QWEN_ONLY),
        Family(
            "nemotron",
            "NemotronForCausalLM",
            NEMOTRON_NAMES,
            {"gated": False, "norm_bias": True},
            {"norm": "LayerNorm", "zero_centered_norm": True, "activation": "relu2"},
            eps="norm_eps",
            rotary_share=0.5,
            only=NEMOTRON_ONLY,
        ),
    )
}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config, llama for the empty one of a model built elsewhere.

    Raises CheckpointError where the config names no family that is known.
    """
    model_type = str(hf.get("model_type")) if hf else "llama"
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported.{did_you_mean(model_type, FAMILIES)} "
            f"Known: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
