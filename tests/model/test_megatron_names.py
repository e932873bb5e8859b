"""A ModelConfig comes back from the GPTModel of its settings; what it cannot express is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch.nn.functional as F

from minitron_megatron.errors import ModelError
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig, build, config_of, shape_of
from minitron_megatron.model.megatron_names import ARGUMENTS, FUNCTIONS, LLAMA3, SHAPE_NAMES, is_execution_setting
from minitron_megatron.model.spec import Norm, block_spec
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import random_plan, trim
from minitron_megatron.testing import Pool

SHAPE = Shape(layers=2, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=128)
MIXTURE: dict[str, Any] = {"ffn": 0, "experts": 4, "experts_per_token": 2, "expert_ffn": 24}
EXPERTS = replace(SHAPE, **MIXTURE)


def llama3(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


CONFIGS = {
    "plain": ModelConfig(SHAPE),
    "sizes": ModelConfig(Shape(3, 40, 56, heads=6, kv_groups=3, head_dim=16, vocab=256), max_positions=64),
    "tied": ModelConfig(replace(SHAPE, tied=True), init_std=0.3),
    "biases": ModelConfig(replace(SHAPE, qkv_bias=True), norm_eps=1e-3),
    "norms of queries and keys": ModelConfig(replace(SHAPE, qk_norm=True), window=5),
    "relu2, gated": ModelConfig(SHAPE, activation="relu2"),
    "nemotron": ModelConfig(
        replace(SHAPE, gated=False, norm_bias=True),
        norm="LayerNorm",
        zero_centered_norm=True,
        activation="relu2",
        rotary_share=0.5,
    ),
    "rotary base": ModelConfig(SHAPE, rotary_base=5e5),
    "linear": ModelConfig(SHAPE, rotary_scaling={"rope_type": "linear", "factor": 3.5}),
    "llama3": ModelConfig(SHAPE, rotary_scaling=llama3(8.0)),
    "llama3, long heads": ModelConfig(
        replace(SHAPE, head_dim=64), rotary_base=5e5, rotary_scaling=llama3(32.0), rotary_share=0.75
    ),
    "experts": ModelConfig(EXPERTS),
    "shared experts": ModelConfig(replace(EXPERTS, shared_ffn=12, shared_gate=True), router_pre_softmax=True),
}


def described(topology: Topology, configs: Mapping[str, ModelConfig]) -> dict[str, ModelConfig]:
    found = {}
    for name, config in configs.items():
        [model] = build(config, topology)
        assert config_of(model) is config and shape_of(model) == config.shape
        del model.minitron
        found[name] = config_of(model)
        assert shape_of(model) == found[name].shape
    return found


def test_every_supported_setting_comes_back(pool: Pool) -> None:
    [found] = pool.run(described, CONFIGS)
    for name, config in CONFIGS.items():
        assert found[name] == config, name


def test_the_configs_here_have_two_values_of_every_field() -> None:
    for field in fields(ModelConfig):
        if field.compare:
            assert len({repr(getattr(config, field.name)) for config in CONFIGS.values()}) > 1, field.name
    for field in fields(Shape):
        assert len({getattr(config.shape, field.name) for config in CONFIGS.values()}) > 1, field.name


# ---- a user's GPTModel


def their_model(config: ModelConfig = CONFIGS["plain"], **changes: Any) -> Any:
    """Return mcore's GPTModel with settings of its TransformerConfig, or arguments of its own, changed."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = config.shape
    settings: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn or 96,  # the width of dense layers; a model of experts has none
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_groups,
        "kv_channels": shape.head_dim,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "use_cpu_initialization": True,
    }
    if shape.experts:
        settings |= {"num_moe_experts": shape.experts, "moe_ffn_hidden_size": shape.expert_ffn}
    arguments: dict[str, Any] = {"vocab_size": 128, "max_sequence_length": 2048, "position_embedding_type": "rope"}
    for name, value in changes.items():
        (arguments if name in inspect.signature(GPTModel.__init__).parameters else settings)[name] = value
    spec = block_spec("RMSNorm", shape.layers, experts=shape.experts)
    return GPTModel(TransformerConfig(**settings), spec, **arguments)


def outcome(model: Any, config: ModelConfig) -> str | ModelConfig:
    """Return the message of a refusal, the config that came back, or `same`."""
    try:
        found = config_of(model)
    except ModelError as error:
        return str(error)
    return "same" if found == config else found


def outcomes(topology: Topology, arguments: Mapping[str, dict[str, Any]]) -> dict[str, str | ModelConfig]:
    return {name: outcome(their_model(**changes), CONFIGS["plain"]) for name, changes in arguments.items()}


GPT_ARGUMENTS: dict[str, tuple[dict[str, Any], str | ModelConfig]] = {
    "nothing": ({}, "same"),
    "vocab_size": ({"vocab_size": 256}, ModelConfig(replace(SHAPE, vocab=256))),
    "max_sequence_length": ({"max_sequence_length": 16}, ModelConfig(SHAPE, max_positions=16)),
    "share_embeddings_and_output_weights": (
        {"share_embeddings_and_output_weights": True},
        ModelConfig(replace(SHAPE, tied=True)),
    ),
    "position_embedding_type": ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
    "no positions": ({"position_embedding_type": "none"}, "position_embedding_type"),
    "rotary_percent": ({"rotary_percent": 0.5}, ModelConfig(SHAPE, rotary_share=0.5)),
    "rotary_base": ({"rotary_base": 500}, ModelConfig(SHAPE, rotary_base=500)),
    "rope_scaling": ({"rope_scaling": True}, ModelConfig(SHAPE, rotary_scaling=llama3(8.0))),
    "rope_scaling_factor": (
        {"rope_scaling": True, "rope_scaling_factor": 3.25},
        ModelConfig(SHAPE, rotary_scaling=llama3(3.25)),
    ),
    "seq_len_interpolation_factor": (
        {"seq_len_interpolation_factor": 2.5},
        ModelConfig(SHAPE, rotary_scaling={"rope_type": "linear", "factor": 2.5}),
    ),
    "two scalings": ({"rope_scaling": True, "seq_len_interpolation_factor": 2.0}, "seq_len_interpolation_factor"),
    "rotary_interleaved": ({"rotary_interleaved": True}, "rotary_interleaved"),
    "fp16_lm_cross_entropy": ({"fp16_lm_cross_entropy": True}, "same"),
    "parallel_output": ({"parallel_output": False}, "same"),
    "scatter_embedding_sequence_parallel": ({"scatter_embedding_sequence_parallel": False}, "same"),
}
"""Case -> changed arguments, and `same`, the config that comes back, or a word of the refusal."""
OTHERS = {"self", "config", "transformer_layer_spec", "pre_process", "post_process", "pg_collection", "vp_stage"}
"""Arguments that say where a chunk lies. `mtp_block_spec` has its own test."""


def test_every_argument_of_a_gpt_model_comes_back_or_is_refused_by_name(pool: Pool) -> None:
    [found] = pool.run(outcomes, {name: changes for name, (changes, _) in GPT_ARGUMENTS.items()})
    for name, (_, wanted) in GPT_ARGUMENTS.items():
        if isinstance(wanted, str) and wanted != "same":
            assert isinstance(found[name], str) and wanted in str(found[name]), (name, found[name])
        else:
            assert found[name] == wanted, name


def arguments_of_gpt_model(topology: Topology) -> set[str]:
    from megatron.core.models.gpt.gpt_model import GPTModel

    return set(inspect.signature(GPTModel.__init__).parameters)


def test_no_argument_of_a_gpt_model_is_forgotten(pool: Pool) -> None:
    [known] = pool.run(arguments_of_gpt_model)
    assert known - OTHERS - {"mtp_block_spec"} <= {each for changes, _ in GPT_ARGUMENTS.values() for each in changes}


# ---- every field of a TransformerConfig


FORWARD = [
    "softmax_scale",
    "softmax_type",
    "apply_residual_connection_post_layernorm",
    "add_bias_linear",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "rotary_interleaved",
    "window_attn_skip_freq",
    "qk_l2_norm",
    "attention_output_gate",
    "multi_latent_attention",
    "no_rope_freq",
    "experimental_attention_variant",
    "linear_attention_freq",
    "mtp_num_layers",
    "moe_layer_freq",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_latent_size",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_force_load_balancing",
    "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
    "moe_apply_probs_on_input",
    "moe_router_load_balancing_type",
    "mrope_section",
    "heterogeneous_block_specs",
    "fp8_param",
    "fp4_param",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "gated_linear_unit",
    "add_qkv_bias",
    "qk_layernorm",
    "activation_func",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "window_size",
    "init_method_std",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
]
"""Settings that change the forward function, as read in mcore 0.16."""
CHANGED = {"activation_func": F.gelu, "window_size": (4, 0), "moe_router_load_balancing_type": "sinkhorn"}


def changed(value: Any) -> Any:
    """Return another value of about the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return 1 if value is None else "other"


def outcomes_of_fields(topology: Topology) -> dict[str, str]:
    """Return field of a TransformerConfig -> `same`, `came back`, or the message, where it alone is changed."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    found = {}
    dense, experts = their_model(), their_model(CONFIGS["experts"])
    assert outcome(experts, CONFIGS["experts"]) == "same"
    for field in fields(TransformerConfig):
        model, config = (experts, CONFIGS["experts"]) if "moe" in field.name else (dense, CONFIGS["plain"])
        before = getattr(model.config, field.name)
        setattr(model.config, field.name, CHANGED.get(field.name, changed(before)))
        result = outcome(model, config)
        found[field.name] = result if isinstance(result, str) else "came back"
        setattr(model.config, field.name, before)
    return found


def test_every_field_of_a_transformer_config_comes_back_or_is_refused_by_name_or_changes_nothing(pool: Pool) -> None:
    [found] = pool.run(outcomes_of_fields)
    for name, result in found.items():
        if name in {**SHAPE_NAMES, **FUNCTIONS}:
            assert result != "same", name
        elif is_execution_setting(name):
            assert result == "same", (name, result)
        else:
            assert name in result, (name, result)
    for name in FORWARD:
        assert found[name] != "same", name
    came_back = {name for name, result in found.items() if result == "came back"}
    assert came_back <= {*SHAPE_NAMES, *FUNCTIONS} and {"layernorm_epsilon", "init_method_std"} <= came_back


def odd_models(topology: Topology) -> dict[str, str | ModelConfig]:
    """Return the outcome of models whose difference shows in their modules only, or in other values of a setting."""
    found = {}
    model = their_model()
    model.mtp_process = True
    found["mtp_block_spec"] = outcome(model, CONFIGS["plain"])
    model = their_model()
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq * (1 + 0.1 * (model.rotary_pos_emb.inv_freq < 0.05))
    found["rotary_pos_emb.inv_freq"] = outcome(model, CONFIGS["plain"])
    model = their_model()
    model.decoder.layers[0].self_attention.q_layernorm = Norm(model.config, SHAPE.head_dim)
    found["q_layernorm.weight"] = outcome(model, CONFIGS["plain"])
    found["window_size"] = outcome(their_model(window_size=(4, 4)), CONFIGS["plain"])
    found["activation_func=gelu"] = outcome(their_model(activation_func=F.gelu), CONFIGS["plain"])
    return found


def test_what_only_modules_show_is_refused_by_name_too(pool: Pool) -> None:
    [found] = pool.run(odd_models)
    for name, message in found.items():
        assert isinstance(message, str) and name in message, (name, message)
    assert found["rotary_pos_emb.inv_freq"] == (
        "the model's rotary frequencies (rotary_pos_emb.inv_freq) are not those of its rotary_base and rotary_percent "
        "with rope_scaling or seq_len_interpolation_factor. Use one of these."
    )
    assert found["q_layernorm.weight"] == (
        "the model's layer spec and its settings do not agree on decoder.layers.*.self_attention.q_layernorm.weight. "
        "Build it from a spec that fits its TransformerConfig."
    )


# ---- a cut model


def cut(topology: Topology, config: ModelConfig, arguments: Mapping[str, Any]) -> ModelConfig:
    model = their_model(config, **arguments)
    [student] = trim(model, random_plan(shape_of(model), 1, hidden=16, heads=2), topology)
    return config_of(student)


def test_a_cut_model_has_all_settings_of_its_own(pool: Pool) -> None:
    arguments = {"rotary_base": 5e5, "rope_scaling": True, "rope_scaling_factor": 4.0, "window_size": (6, 0)}
    [found] = pool.run(cut, CONFIGS["plain"], arguments | {"layernorm_epsilon": 1e-4, "max_sequence_length": 32})
    shape = SHAPE.resized(hidden=16, heads=2)
    wanted = ModelConfig(shape, norm_eps=1e-4, rotary_base=5e5, rotary_scaling=llama3(4.0), window=7, max_positions=32)
    assert found == wanted


def geglu_cut(topology: Topology) -> tuple[Shape, str]:
    model = their_model(activation_func=F.gelu)
    [student] = trim(model, random_plan(shape_of(model), 1, ffn=24), topology)
    assert student.config.activation_func is F.gelu
    return shape_of(student), str(outcome(student, CONFIGS["plain"]))


def test_a_model_that_no_config_expresses_can_be_cut(pool: Pool) -> None:
    [(shape, message)] = pool.run(geglu_cut)
    assert shape == SHAPE.resized(ffn=24)
    assert "activation_func=gelu" in message


def test_the_table_names_every_field_once() -> None:
    named = [field for names in (SHAPE_NAMES, FUNCTIONS, ARGUMENTS) for field in names.values()]
    known = {field.name for each in (Shape, ModelConfig) for field in fields(each)}
    assert sorted(named) == sorted(known - {"shape", "source", "norm_bias", "rotary_scaling"})
