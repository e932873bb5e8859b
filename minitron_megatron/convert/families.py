"""Model families, one row each: tensor names, and the config keys that only this family has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import CheckpointError, did_you_mean
from ..registry import Registry
from .bridge import bridged
from .family import WHOLE, Family, Keys, Names
from .keys import DECIMAL, FLAG, LAYER_TYPES, NATURAL, NULL, NUMBER, SHARE, SIZE, WINDOW, HfConfig, Kind, Only, free

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
    """Return the names of an MoE family: those of a dense family with other MLPs."""
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
MIXTRAL_KEYS: Keys = {
    **EXPERT_KEYS,
    "experts": ("num_local_experts", "num_experts"),
    "expert_ffn": ("intermediate_size",),
}
QWEN2_MOE_KEYS: Keys = {
    **EXPERT_KEYS,
    "experts": ("num_experts",),
    "expert_ffn": ("moe_intermediate_size",),
    "shared_ffn": ("shared_expert_intermediate_size",),
}
QWEN3_MOE_KEYS: Keys = {
    **EXPERT_KEYS,
    "experts": ("num_experts", "num_local_experts"),  # transformers 4.x and 5.x
    "expert_ffn": ("moe_intermediate_size",),
}

WINDOWS: Mapping[str, Kind] = {"sliding_window": WINDOW}
LAYER_WINDOWS: Mapping[str, Kind] = {
    "use_sliding_window": FLAG,
    "sliding_window": WINDOW,
    "max_window_layers": NATURAL,
    "layer_types": LAYER_TYPES,
}
ROTATED: Mapping[str, Kind] = {"partial_rotary_factor": SHARE}
QWEN_DEFAULTS: Mapping[str, object] = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
MISTRAL_DEFAULTS: Mapping[str, object] = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
QWEN_MOE: Mapping[str, Kind] = {"norm_topk_prob": FLAG}
QWEN_MOE_ONLY: Only = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
ROUTER = free("router losses act only in training with transformers", DECIMAL, "router_aux_loss_coef")
ROUTER |= free("router losses act only in training with transformers", FLAG, "output_router_logits")
DENSE = free("width of dense layers; this model has none", SIZE, "intermediate_size")

BUILT_IN: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            LLAMA_NAMES,
            defaults={"max_position_embeddings": 2048},
            nullable=("num_key_value_heads", "head_dim"),
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            LLAMA_NAMES,
            read=WINDOWS,
            defaults={**MISTRAL_DEFAULTS, "sliding_window": 4096},
            nullable=("head_dim",),
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            QWEN2_NAMES,
            {"qkv_bias": True},
            read=LAYER_WINDOWS,
            defaults={**QWEN_DEFAULTS, "num_key_value_heads": 32},
            nullable=("num_key_value_heads",),
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            QWEN3_NAMES,
            {"qk_norm": True},
            read=LAYER_WINDOWS,
            defaults={**QWEN_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
            nullable=("num_key_value_heads",),
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            PHI3_NAMES,
            read={**WINDOWS, **ROTATED},
            defaults={
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "partial_rotary_factor": 1.0,
                "pad_token_id": 32000,
            },
            nullable=("num_key_value_heads",),
            rope=("default",),
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            MIXTRAL_NAMES,
            keys=MIXTRAL_KEYS,
            read=WINDOWS,
            defaults={**MISTRAL_DEFAULTS, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2},
            nullable=("head_dim",),
            only={"norm_topk_prob": (True,)},
            free={
                **ROUTER,
                **free("router noise acts only in training with transformers", DECIMAL, "router_jitter_noise"),
            },
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            _mixture(QWEN2_NAMES, {**QWEN_EXPERTS, **QWEN_SHARED}),
            {"qkv_bias": True, "shared_gate": True},
            keys=QWEN2_MOE_KEYS,
            read={"layer_types": LAYER_TYPES, **QWEN_MOE},
            defaults={
                **QWEN_DEFAULTS,
                "num_key_value_heads": 16,
                "num_experts_per_tok": 4,
                "norm_topk_prob": False,
            },
            only={**QWEN_MOE_ONLY, "qkv_bias": (True,), "use_sliding_window": (False,)},
            free={
                **ROUTER,
                **DENSE,
                **free("earlier versions of this package exported it besides num_experts", SIZE, "num_local_experts"),
                **free("only for attention windows, which are off", NATURAL | NULL, "sliding_window"),
                **free("only for attention windows, which are off", NATURAL, "max_window_layers"),
            },
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _mixture(QWEN3_NAMES, QWEN_EXPERTS),
            {"qk_norm": True},
            keys=QWEN3_MOE_KEYS,
            read={"use_sliding_window": FLAG, **WINDOWS, **QWEN_MOE},
            defaults={
                **QWEN_DEFAULTS,
                "num_key_value_heads": 4,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
            },
            only=QWEN_MOE_ONLY,
            free={
                **ROUTER,
                **DENSE,
                **free("in this family all layers have a window or none has", NATURAL, "max_window_layers"),
            },
        ),
        Family(
            "nemotron",
            "NemotronForCausalLM",
            NEMOTRON_NAMES,
            {"gated": False, "norm_bias": True},
            {"norm": "LayerNorm", "zero_centered_norm": True, "activation": "relu2"},
            eps="norm_eps",
            read=ROTATED,
            defaults={
                "max_position_embeddings": 4096,
                "norm_eps": 1e-5,
                "initializer_range": 0.0134,
                "partial_rotary_factor": 0.5,
                "num_key_value_heads": ...,
            },
            nullable=("head_dim",),
            rope=("default",),  # transformers 4.57 ignores any scaling here; 5 applies it
            only={"hidden_act": ("relu2",)},
            free=free("transformers reads only norm_eps", NUMBER, "rms_norm_eps layer_norm_eps"),
        ),
    )
}
FAMILIES: Registry[Family] = Registry("model family", BUILT_IN)

BIASED_LLAMA = replace(
    FAMILIES["llama"],
    names=QWEN2_NAMES,
    shape={"qkv_bias": True},
    only={"attention_bias": (True,)},
    zeros={LAYER + "self_attention.linear_proj.weight": HF_LAYER + "self_attn.o_proj.bias"},
)
"""A Llama with `attention_bias`. It computes the same as a Qwen2 if the bias of the attention output is zero."""


def family_of(hf: HfConfig) -> Family:
    """Return the family of a Hugging Face config; llama for the empty config of a model built elsewhere.

    A family without a row here is looked up in Megatron-Bridge, if that is installed. Raises CheckpointError for a
    family that neither knows.
    """
    if hf and hf.get("model_type") is None:
        raise CheckpointError(f"the config does not say model_type. Known: {', '.join(FAMILIES)}.")
    model_type = str(hf.get("model_type")) if hf else "llama"
    if model_type == "llama" and hf.get("attention_bias") is True:
        return BIASED_LLAMA
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    family = bridged(hf)
    if family is None:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported.{did_you_mean(model_type, FAMILIES)} "
            f"Known: {', '.join(FAMILIES)}; with Megatron-Bridge installed, also its families that compute the same."
        )
    return family
