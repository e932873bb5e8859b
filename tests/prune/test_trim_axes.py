"""Every axis of every family: a cut equals indexing the Hugging Face tensors, and pruned equals masked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minitron_megatron.convert import load_hf, read_config, save_hf
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import trim
from minitron_megatron.records import Plan
from minitron_megatron.testing import Pool
from tests.convert.conftest import MIXTURES, make_folder

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 131,
}
KINDS = {
    "llama-tied": {},
    "qwen2": {},
    "qwen3-tied": {},
    "nemotron": {},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": False},
}
LAYOUTS: Mapping[str, dict[str, Any]] = {
    "tp1": {},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "tp2-pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "ep2": {"ep": 2, "dp": 2},
    "ep2-tp2": {"ep": 2, "tp": 2, "sequence_parallel": True},
    "ep4-tp2": {"ep": 4, "tp": 2, "dp": 2, "sequence_parallel": True},
    "ep2-pp2": {"ep": 2, "pp": 2, "dp": 2},
}
LAYERS = (0, 2, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: make_folder(root / kind, kind, **{**SIZES, **sizes}) for kind, sizes in KINDS.items()}


def plan_for(folder: Path, *, hidden: bool = True) -> Plan:
    """Cut all axes at once, differently in each layer: units of one rank only, of the other only, of both."""
    shape = read_config(folder).shape
    groups = {0: (0, 1), 2: (2, 3), 3: (0, 3)}
    keep: dict[str, dict[int | None, tuple[int, ...]]] = {
        "kv_groups": dict(groups),
        "heads": {layer: tuple(2 * g + (g + layer) % 2 for g in kept) for layer, kept in groups.items()},
    }
    if shape.ffn:
        keep["ffn"] = {0: tuple(range(16)), 2: tuple(range(16, 32)), 3: (*range(4), *range(10, 22))}
    if shape.experts:
        experts = {0: (0, 1, 2, 3), 2: (4, 5, 6, 7), 3: (0, 3, 5, 6)}
        keep["experts"] = dict(experts)
        keep["expert_ffn"] = {
            layer: tuple(16 * e + n for e in kept for n in range((e + layer) % 5, (e + layer) % 5 + 12))
            for layer, kept in experts.items()
        }
    if shape.shared_ffn:
        keep["shared_ffn"] = {0: tuple(range(12)), 2: tuple(range(12, 24)), 3: (*range(3), *range(9, 18))}
    if hidden:
        keep["hidden"] = {None: (*range(20), *range(30, 42))}
    return Plan(shape, keep, LAYERS)


# ---- reference: indexing the Hugging Face tensors


def indexed(folder: Path, plan: Plan) -> dict[str, Tensor]:
    out = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if not found:
            hidden = list(plan.kept_at("hidden", None))
            out[name] = weight[hidden] if weight.dim() == 1 else weight[:, hidden]
            continue
        layer, leaf = int(found[1]), found[2]
        expert = int(number[1]) if (number := re.search(r"experts\.(\d+)\.", leaf)) else None
        if layer not in LAYERS or (expert is not None and expert not in plan.kept_at("experts", layer)):
            continue
        if expert is not None:
            at = plan.kept_at("experts", layer).index(expert)
            leaf = leaf.replace(f"experts.{expert}.", f"experts.{at}.")
        for dim, kept in enumerate(kept_of(leaf, plan, layer, expert)):
            if kept is not None:
                weight = weight.index_select(dim, torch.tensor(kept))
        out[f"model.layers.{LAYERS.index(layer)}.{leaf}"] = weight
    return out


def kept_of(leaf: str, plan: Plan, layer: int, expert: int | None) -> list[list[int] | None]:
    """Return the kept rows of each dim of a layer's tensor, leaf by leaf."""
    channels = lambda units: [unit * 8 + i for unit in units for i in range(8)]  # noqa: E731
    hidden = list(plan.kept_at("hidden", None))
    if expert is not None:
        neurons = [unit - 16 * expert for unit in plan.kept_at("expert_ffn", layer) if unit // 16 == expert]
        return [hidden, neurons] if "down_proj" in leaf or "w2" in leaf else [neurons, hidden]
    q, kv = channels(plan.kept_at("heads", layer)), channels(plan.kept_at("kv_groups", layer))
    ffn = list(plan.kept_at("shared_ffn" if "shared_expert." in leaf else "ffn", layer))
    rows = {
        "q_proj": [q, hidden], "k_proj": [kv, hidden], "v_proj": [kv, hidden], "o_proj": [hidden, q],
        "gate_proj": [ffn, hidden], "up_proj": [ffn, hidden], "down_proj": [hidden, ffn],
        "gate": [list(plan.kept_at("experts", layer)), hidden], "shared_expert_gate": [None, hidden],
        "input_layernorm": [hidden], "post_attention_layernorm": [hidden], "q_norm": [None], "k_norm": [None],
    }  # fmt: skip
    part, kind = leaf.split(".")[-2:]
    return rows[part][:1] if kind == "bias" else rows[part]


def cut(topology: Topology, folder: Path, plan: Plan, out: Path) -> None:
    save_hf(trim(load_hf(folder, topology), plan, topology), out, topology, files_from=folder)


CASES = [
    *(("llama-tied", layout) for layout in LAYOUTS if "ep" not in layout),
    *((kind, "tp2-pp2") for kind in KINDS if kind not in ("llama-tied", *MIXTURES)),
    *(("qwen2_moe", layout) for layout in LAYOUTS),  # the one with shared experts
    *((kind, layout) for kind in ("mixtral", "qwen3_moe") for layout in ("ep2-tp2", "ep2-pp2")),
]
"""Every family at tp x pp or ep, and one of each kind at every layout: which rows are cut is read from one table."""


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_the_cut_is_what_indexing_gives(
    pool: Pool, folders: dict[str, Path], kind: str, layout: str, tmp_path: Path
) -> None:
    plan = plan_for(folders[kind])
    pool.run(cut, folders[kind], plan, tmp_path / "cut", **LAYOUTS[layout])
    found, expected = load_file(tmp_path / "cut" / "model.safetensors"), indexed(folders[kind], plan)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert read_config(tmp_path / "cut").shape == plan.target


# ---- law 3


class WithoutExperts(TorchFunctionMode):
    """Mode in which the routers never send a token to a cut expert."""

    def __init__(self, routers: Mapping[int, list[int]]) -> None:
        super().__init__()
        self.routers = routers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self.routers:
            out[..., self.routers[id(args[1])]] = -torch.inf
        return out


@contextmanager
def masked(folder: Path, plan: Plan, into: Path) -> Iterator[Any]:
    """Return a transformers model in which the cut units contribute nothing."""
    from transformers import AutoModelForCausalLM

    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if found and weight.dim() == 2 and int(found[1]) in LAYERS:
            number = re.search(r"experts\.(\d+)\.", name)
            _, columns = kept_of(found[2], plan, int(found[1]), int(number[1]) if number else None)
            weight[:, sorted({*range(weight.shape[1])} - {*columns})] = 0  # type: ignore[misc]
    into.mkdir()
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    shutil.copyfile(folder / "config.json", into / "config.json")
    model = AutoModelForCausalLM.from_pretrained(into, dtype=torch.float32).eval()
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in LAYERS)
    routers = {}
    if plan.shape.experts:
        for layer, block in zip(LAYERS, model.model.layers, strict=True):
            cut_experts = sorted({*range(plan.shape.experts)} - {*plan.kept_at("experts", layer)})
            routers[id(block.mlp.gate.weight)] = cut_experts
    with torch.no_grad(), WithoutExperts(routers):
        yield model


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_is_masked(pool: Pool, folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan = plan_for(folders[kind], hidden=False)
    pool.run(cut, folders[kind], plan, tmp_path / "cut", **LAYOUTS["tp2-sp"])
    tokens = torch.randint(0, 131, (3, 24), generator=torch.Generator().manual_seed(0))
    with masked(folders[kind], plan, tmp_path / "masked") as model:
        truth = model(tokens, use_cache=False).logits
    with torch.no_grad():
        pruned, whole = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens, use_cache=False).logits
            for folder in (tmp_path / "cut", folders[kind])
        )
    assert (pruned - truth).abs().max() < 1e-5 * truth.abs().max()
    assert (whole - truth).abs().max() > 1e-2 * truth.abs().max()
