"""The model families, a row each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, did_you_mean
from .bridge import bridged
from .family import WHOLE, Family, Keys, Names, Only

__all__ = ["FAMILIES", "family_of"]

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
PHI3_NAMES: Names = {
    **LLAMA_NAMES,
    LAYER + "self_attention.linear_qkv.weight": dict.fromkeys(("q", "k", "v"), HF_LAYER + "self_attn.qkv_proj.weight"),
    LAYER + "mlp.linear_fc1.weight": dict.fromkeys(("gate", "up"), HF_LAYER + "mlp.gate_up_proj.weight"),
}
NEMOTRON_NAMES: Names = {
    **LLAMA_NAMES,
    LAYER + "input_layernorm.bias": {WHOLE: HF_LAYER + "input_layernorm.bias"},
    LAYER + "pre_mlp_layernorm.bias": {WHOLE: HF_LAYER + "post_attention_layernorm.bias"},
    LAYER + "mlp.linear_fc1.weight": {"up": HF_LAYER + "mlp.up_proj.weight"},
    "decoder.final_layernorm.bias": {WHOLE: "model.norm.bias"},
}

EXPERT, HF_MIXTURE = LAYER + "mlp.experts.local_experts.*.", HF_LAYER + "block_sparse_moe."


def _mixture(dense: Names, names: Names) -> Names:
    """The names of a family whose MLPs are mixtures."""
    return {**{name: hf for name, hf in dense.items() if ".mlp." not in name}, **names}


MIXTRAL_NAMES: Names = _mixture(
    LLAMA_NAMES,
    {
        LAYER + "mlp.router.weight": {WHOLE: HF_MIXTURE + "gate.weight"},
        EXPERT + "linear_fc1.weight": {
            role: f"{HF_MIXTURE}experts.*.{hf}.weight" for role, hf in (("gate", "w1"), ("up", "w3"))
        },
        EXPERT + "linear_fc2.weight": {WHOLE: HF_MIXTURE + "experts.*.w2.weight"},
    },
)
QWEN_EXPERTS: Names = {
    LAYER + "mlp.router.weight": {WHOLE: HF_LAYER + "mlp.gate.weight"},
    EXPERT + "linear_fc1.weight": {role: f"{HF_LAYER}mlp.experts.*.{role}_proj.weight" for role in ("gate", "up")},
    EXPERT + "linear_fc2.weight": {WHOLE: HF_LAYER + "mlp.experts.*.down_proj.weight"},
}
QWEN_SHARED: Names = {
    LAYER + "mlp.shared_experts.linear_fc1.weight": {
        role: f"{HF_LAYER}mlp.shared_expert.{role}_proj.weight" for role in ("gate", "up")
    },
    LAYER + "mlp.shared_experts.linear_fc2.weight": {WHOLE: HF_LAYER + "mlp.shared_expert.down_proj.weight"},
    LAYER + "mlp.shared_experts.gate_weight": {WHOLE: HF_LAYER + "mlp.shared_expert_gate.weight"},
}
EXPERT_KEYS: Keys = {"experts_per_token": ("num_experts_per_tok",)}
MIXTRAL_KEYS: Keys = {**EXPERT_KEYS, "experts": ("num_local_experts",), "expert_ffn": ("intermediate_size",)}
QWEN_MOE_KEYS: Keys = {
    **EXPERT_KEYS,
    "experts": ("num_experts", "num_local_experts"),  # of transformers 4.x and, for Qwen3, 5.x
    "expert_ffn": ("moe_intermediate_size",),
}

LLAMA_ONLY: Only = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)}
NEMOTRON_ONLY: Only = {"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)}
MIXTRAL_ONLY: Only = {"hidden_act": ("silu",), "attention_bias": (False,)}
QWEN_ONLY: Only = {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)}
QWEN_MOE_ONLY: Only = {**QWEN_ONLY, "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", LLAMA_NAMES, only=LLAMA_ONLY),
        Family("mistral", "MistralForCausalLM", LLAMA_NAMES, only=LLAMA_ONLY),
        Family("qwen2", "Qwen2ForCausalLM", QWEN2_NAMES, {"qkv_bias": True}, only=QWEN_ONLY),
        Family("qwen3", "Qwen3ForCausalLM", QWEN3_NAMES, {"qk_norm": True}, only=QWEN_ONLY),
        Family("phi3", "Phi3ForCausalLM", PHI3_NAMES, only=LLAMA_ONLY),
        Family("mixtral", "MixtralForCausalLM", MIXTRAL_NAMES, only=MIXTRAL_ONLY, keys=MIXTRAL_KEYS),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            _mixture(QWEN2_NAMES, {**QWEN_EXPERTS, **QWEN_SHARED}),
            {"qkv_bias": True, "shared_gate": True},
            only={**QWEN_MOE_ONLY, "qkv_bias": (True,)},
            keys={**QWEN_MOE_KEYS, "shared_ffn": ("shared_expert_intermediate_size",)},
            renormalises=False,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _mixture(QWEN3_NAMES, QWEN_EXPERTS),
            {"qk_norm": True},
            only=QWEN_MOE_ONLY,
            keys=QWEN_MOE_KEYS,
            renormalises=False,
        ),
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
    """The family of a Hugging Face config, llama for the empty one of a model built elsewhere; without a row here, what
    Megatron-Bridge knows of it, where that is installed.

    Raises CheckpointError where neither knows it.
    """
    model_type = str(hf.get("model_type")) if hf else "llama"
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    family = bridged(hf)
    if family is None:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported.{did_you_mean(model_type, FAMILIES)} "
            f"Known: {', '.join(FAMILIES)}; with Megatron-Bridge installed, those of its families that compute alike."
        )
    return family
