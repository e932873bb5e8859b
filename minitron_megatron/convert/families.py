"""The model families: what Hugging Face calls each parameter, and what makes a family different."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, did_you_mean
from ..layout import Shape, expert_of, layer_of, lookup, pattern_of

__all__ = ["FAMILIES", "WHOLE", "Family", "family_of"]

WHOLE = ""
"""The role of a Hugging Face tensor that is all of a Megatron one."""

Names = Mapping[str, Mapping[str, str]]
"""Megatron pattern -> role -> Hugging Face pattern. Roles that name one tensor lie in it one after the other."""


Keys = Mapping[str, tuple[str, ...]]
"""Field of `Shape` -> the config's names for it: the first that is there is read, all are written."""

Only = Mapping[str, tuple[Any, ...]]
"""Setting -> the values that are supported; the first is what an absent one means."""

LLAMA_ONLY: Only = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)}
NEMOTRON_ONLY: Only = {"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)}
MIXTRAL_ONLY: Only = {"hidden_act": ("silu",), "attention_bias": (False,)}
QWEN_ONLY: Only = {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)}
QWEN_MOE_ONLY: Only = {**QWEN_ONLY, "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


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
    keys: Keys = field(default_factory=lambda: {"ffn": ("intermediate_size",)})
    """How its config calls what is not alike in all families."""
    renormalises: bool = True
    """Whether a token's experts are weighed among themselves where its config does not say (`norm_topk_prob`)."""

    def hf_names(self, name: str) -> dict[str, str]:
        """role -> Hugging Face tensor, for a parameter's global Megatron name."""
        numbers = [str(number) for number in (layer_of(name), expert_of(name)) if number is not None]
        return {role: hf.replace("*", "{}").format(*numbers) for role, hf in self.names[pattern_of(name)].items()}

    def rows(self, name: str, sizes: Mapping[str, int]) -> dict[str, list[Tensor]]:
        """Hugging Face tensor -> the rows of a parameter that it is, part by part: int64 [rows of the part] each."""
        param = lookup(name)
        parts: dict[str, list[Tensor]] = {}
        for role, hf in self.hf_names(name).items():
            every = role == WHOLE
            rows = torch.arange(param.shape(sizes)[0]) if every else param.role_rows(0, role, sizes)
            parts.setdefault(hf, []).append(rows)
        return parts

    def tensors(self, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every Hugging Face tensor of a shape with its own shape, in the order of the layers."""
        sizes = shape.sizes(padded=False)
        for name in shape.names():
            for hf, parts in self.rows(name, sizes).items():
                yield hf, (sum(map(len, parts)), *lookup(name).shape(sizes)[1:])


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

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", LLAMA_NAMES),
        Family("mistral", "MistralForCausalLM", LLAMA_NAMES),
        Family("qwen2", "Qwen2ForCausalLM", QWEN2_NAMES, {"qkv_bias": True}, only=QWEN_ONLY),
        Family("qwen3", "Qwen3ForCausalLM", QWEN3_NAMES, {"qk_norm": True}, only=QWEN_ONLY),
        Family("phi3", "Phi3ForCausalLM", PHI3_NAMES),
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
    from .bridge import bridged

    family = bridged(hf)
    if family is None:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported.{did_you_mean(model_type, FAMILIES)} "
            f"Known: {', '.join(FAMILIES)}; with Megatron-Bridge installed, those of its families that compute alike."
        )
    return family
