"""Families known only to Megatron-Bridge, here with stand-ins in the form of its versions 0.4.2 and 0.6.2.

`tests/compat/bridge.sh` runs the two versions themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minitron_megatron.convert import bridge, check_folder, load_hf, read_config, save_hf
from minitron_megatron.data import Batch
from minitron_megatron.errors import CheckpointError
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

from .conftest import make_folder, make_renamed

LAYER, HF_LAYER = "decoder.layers.*.", "trunk.blocks.*."


def layer_spec(config: Any) -> None: ...


@dataclass
class GPTModelProvider:
    """Stand-in with some of the real class's 300 fields, with the same defaults."""

    num_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    num_query_groups: int | None = None
    kv_channels: int | None = None
    ffn_hidden_size: int | None = None
    vocab_size: int | None = None
    share_embeddings_and_output_weights: bool = True
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    gated_linear_unit: bool = False
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    activation_func: Callable[..., Any] = F.gelu
    position_embedding_type: str = "learned_absolute"
    rotary_base: float = 10000
    rotary_percent: float = 1.0
    rope_scaling: bool = False
    rope_scaling_factor: float = 1.0
    seq_len_interpolation_factor: float | None = None
    num_moe_experts: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_router_pre_softmax: bool = False
    window_size: tuple[int, int] | None = None
    no_rope_freq: list[int] = field(default_factory=list)
    bias_activation_fusion: bool = False
    transformer_layer_spec: Callable[..., Any] = layer_spec

    def provide(self) -> None: ...


class AutoMapping:
    def __init__(self, megatron_param: str, hf_param: Any) -> None:
        self.megatron_param, self.hf_param = megatron_param, hf_param


class QKVMapping(AutoMapping): ...


class GatedMLPMapping(AutoMapping): ...


class RMSNorm2ZeroCenteredRMSNormMapping(AutoMapping): ...


class MegatronModelBridge:
    CONFIG_MAPPING = (("intermediate_size", "ffn_hidden_size"), ("num_experts", "num_moe_experts"))

    def mapping_registry(self) -> list[AutoMapping]:
        qkv, norm = LAYER + "self_attention.linear_qkv.", HF_LAYER + "norm_1.weight"
        return [
            AutoMapping("embedding.word_embeddings.weight", "trunk.embed.weight"),
            AutoMapping("output_layer.weight", "head.weight"),
            AutoMapping("decoder.final_layernorm.weight", "trunk.norm.weight"),
            AutoMapping(qkv + "layer_norm_weight", norm),
            AutoMapping(LAYER + "input_layernorm.weight", norm),
            AutoMapping(LAYER + "pre_mlp_layernorm.weight", HF_LAYER + "norm_2.weight"),
            QKVMapping(qkv + "weight", {role: f"{HF_LAYER}attention.{role}.weight" for role in "qkv"}),
            AutoMapping(LAYER + "self_attention.linear_proj.weight", HF_LAYER + "attention.o.weight"),
            GatedMLPMapping(
                LAYER + "mlp.linear_fc1.weight", {role: f"{HF_LAYER}mlp.{role}.weight" for role in ("gate", "up")}
            ),
            AutoMapping(LAYER + "mlp.linear_fc2.weight", HF_LAYER + "mlp.down.weight"),
        ]

    def maybe_modify_loaded_hf_weight(self) -> None: ...


SAID: dict[str, Any] = {
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "normalization": "RMSNorm",
    "activation_func": F.silu,
    "position_embedding_type": "rope",
    "bias_activation_fusion": True,
}
"""Settings that the family's bridge adds to the config's."""


class AutoBridge:
    settings: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    provider: type = GPTModelProvider
    _model_bridge: Any = MegatronModelBridge()

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def from_hf_config(cls, config: Any) -> AutoBridge:
        if config.architectures != ["OursForCausalLM"]:
            raise ValueError("not supported; those that are: ...")
        return cls(config)

    def to_megatron_provider(self, load_weights: bool = True) -> Any:
        assert not load_weights
        hf = self.config
        settings = self.provider(
            **{
                "num_layers": hf.num_hidden_layers,
                "hidden_size": hf.hidden_size,
                "num_attention_heads": hf.num_attention_heads,
                "num_query_groups": hf.num_key_value_heads,
                "kv_channels": hf.head_dim,
                "ffn_hidden_size": hf.intermediate_size,
                "vocab_size": hf.vocab_size,
                "layernorm_epsilon": hf.rms_norm_eps,
                "share_embeddings_and_output_weights": hf.tie_word_embeddings,
                **SAID,
                **self.settings,
            }
        )
        settings.pad_token_id = hf.pad_token_id  # as its bridges do: an attribute that is not a field
        vars(settings).update(self.extra)
        return settings


def install(auto: type = AutoBridge) -> None:
    held = {
        "megatron.bridge": {"AutoBridge": auto},
        "megatron.bridge.models": {},
        "megatron.bridge.models.gpt_provider": {"GPTModelProvider": GPTModelProvider},
        "megatron.bridge.models.conversion": {},
        "megatron.bridge.models.conversion.model_bridge": {"MegatronModelBridge": MegatronModelBridge},
    }
    for name, what in held.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        vars(module).update(what)
        sys.modules[name] = module
    forget()


def remove() -> None:
    for name in [name for name in sys.modules if name.startswith("megatron.bridge")]:
        del sys.modules[name]
    forget()


def forget() -> None:
    for cached in (bridge._known, bridge._defaults):
        cached.cache_clear()


@pytest.fixture
def installed() -> Iterator[None]:
    install()
    yield
    remove()


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Return a Llama under names that transformers does not know; next to it lies the original."""
    return make_renamed(tmp_path / "ours", make_folder(tmp_path / "llama", "llama-tied"))


def through(topology: Topology, folder: Path, export: Path) -> float:
    install()
    try:
        model = load_hf(folder, topology)
        tokens = torch.arange(2, 42).view(2, 20)
        save_hf(model, export, topology)
        return check_folder(model, folder.parent / "llama", Batch(tokens, tokens, tokens >= 0), topology)
    finally:
        remove()


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_it_is_read_as_what_it_is_and_written_as_it_was(
    pool: Pool, ours: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    assert max(pool.run(through, ours, tmp_path / "export", **layout)) < 1e-4
    written, read = (load_file(folder / "model.safetensors") for folder in (tmp_path / "export", ours))
    assert set(written) == set(read) and all(torch.equal(written[name], read[name]) for name in read)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("ours", ["OursForCausalLM"])
    assert config["auto_map"]  # Megatron-Bridge identifies the export by it


def test_what_neither_knows_is_an_error_that_names_both(installed: None, ours: Path) -> None:
    path = ours / "config.json"
    path.write_text(path.read_text().replace("OursForCausalLM", "TheirsForCausalLM"))
    with pytest.raises(
        CheckpointError,
        match=r"model_type 'ours' is not supported.*Known: llama, .*; with Megatron-Bridge installed, also its",
    ):
        read_config(ours)


@dataclass
class ItsOwn(GPTModelProvider):
    def provide(self) -> None: ...


class Changed(MegatronModelBridge):
    def maybe_modify_loaded_hf_weight(self) -> None: ...


class Centred(MegatronModelBridge):
    def mapping_registry(self) -> list[AutoMapping]:
        *rest, last = super().mapping_registry()
        return [*rest, RMSNorm2ZeroCenteredRMSNormMapping(last.megatron_param, last.hf_param)]


MORE = make_dataclass("MORE", [("softcap", float, field(default=50.0))], bases=(GPTModelProvider,))


@pytest.mark.parametrize(
    ("bridged", "words"),
    [
        ({"settings": {"window_size": (128, 0)}}, r"window_size=\(128, 0\); here it would be None"),
        ({"settings": {"no_rope_freq": [1]}}, r"no_rope_freq=\[1\]; here it would be \[\]"),
        ({"settings": {"add_bias_linear": True}}, "add_bias_linear=True; here it would be False"),
        ({"settings": {"rotary_base": 5e5}}, "rotary_base=500000.0; here it would be 10000.0"),
        ({"settings": {"activation_func": F.gelu}}, "activation_func=gelu is not one of silu, relu2"),
        (
            {"settings": {"qk_layernorm": True}},
            r"no plain tensor mapping for decoder.layers.\*.self_attention.k_layernorm.weight",
        ),
        ({"settings": {"transformer_layer_spec": print}}, "layers of its own"),
        ({"provider": ItsOwn}, r"a model of its own \(ItsOwn\)"),
        ({"provider": MORE}, "settings of its own: softcap"),
        ({"extra": {"value_scale": 2.0}}, "settings of its own: value_scale"),
        ({"provider": SimpleNamespace}, r"its model is not a GPTModel \(SimpleNamespace\)"),
        ({"settings": {"unheard_of": 1}}, "TypeError: "),
        ({"_model_bridge": Changed()}, "Changed changes weights while loading"),
        ({"_model_bridge": Centred()}, r"no plain tensor mapping for decoder.layers.\*.mlp.linear_fc2.weight"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_what_our_models_do_not_compute_is_refused(
    installed: None, ours: Path, bridged: dict[str, Any], words: str
) -> None:
    install(type("AutoBridge", (AutoBridge,), bridged))
    with pytest.raises(
        CheckpointError, match=f"'ours' is not built in, and Megatron-Bridge's version is not supported: .*{words}"
    ):
        read_config(ours)
