"""Scores of experts, their neurons and shared experts equal those of plain torch at every layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from minitron_megatron.convert import load_hf, read_config
from minitron_megatron.errors import PlanError
from minitron_megatron.parallel import Topology
from minitron_megatron.records import Scores, Statistic
from minitron_megatron.score import score
from minitron_megatron.score.experts import Mixture
from minitron_megatron.testing import Pool
from tests.convert.conftest import make_folder
from tests.score.truth import REDUCE, SAMPLES, Values, expect_truth
from tests.tiny import samples, share

NINE = [Statistic(batch, sequence) for batch, sequence in product(("l2", "mean", "var"), repeat=2)]
EVERYWHERE = [Statistic(), Statistic("var", "l2"), Statistic("mean", "var")]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "pp2-vp2": {"pp": 2, "vp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "dp2": {"dp": 2},
    "ep2-tp2": {"ep": 2, "tp": 2, "sequence_parallel": True},
    "ep2-pp2": {"ep": 2, "pp": 2, "dp": 2},
    "ep4-tp2-dp2": {"ep": 4, "tp": 2, "dp": 2, "sequence_parallel": True},
}
LAYERS, EXPERTS = 4, 4
NAMES = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.{}", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp.gate", "mlp.experts.{}", ("gate_proj", "up_proj", "down_proj")),
}
Mixed = list[list[dict[str, Tensor]]]
"""Layer -> sample -> outputs of its experts at the counted positions."""


def by_hand(folder: Path, kind: str) -> Mixed:
    """Route and compute every token with the weights of the file; the block's output is still transformers' own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights, every = load_file(folder / "model.safetensors"), samples(SAMPLES)
    gate, expert, linears = NAMES[kind]
    seen: Mixed = [[] for _ in range(LAYERS)]

    def keep(layer: int, block: Any, args: tuple[Tensor, ...], out: Any) -> None:
        at, states = f"model.layers.{layer}.", args[0][0]
        shares = F.softmax(states @ weights[f"{at}{gate}.weight"].t(), dim=-1)
        best, chosen = shares.topk(2, dim=-1)
        if kind == "mixtral":
            best = best / best.sum(-1, keepdim=True)
        share = torch.zeros_like(shares).scatter(1, chosen, best)
        neurons, given = [], []
        for e in range(EXPERTS):
            w1, w3, w2 = (weights[f"{at}{expert.format(e)}.{linear}.weight"] for linear in linears)
            neurons.append(F.silu(states @ w1.t()) * (states @ w3.t()) * share[:, e : e + 1])
            given.append(neurons[-1] @ w2.t())
        found = {"neurons": torch.stack(neurons, 1), "given": torch.stack(given, 1), "sent": share > 0}
        total = found["given"].sum(1)
        if kind == "qwen2_moe":
            g, u, d = (weights[f"{at}mlp.shared_expert.{linear}.weight"] for linear in linears)
            found["shared"] = F.silu(states @ g.t()) * (states @ u.t())
            opened = torch.sigmoid(states @ weights[f"{at}mlp.shared_expert_gate.weight"].t())
            total = total + found["shared"] @ d.t() * opened
        torch.testing.assert_close(out[0], total, rtol=1e-4, atol=1e-4)
        seen[layer].append(found)

    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(
            lambda m, a, out, layer=layer: keep(layer, m, a, (out[0],) if isinstance(out, tuple) else out)
        )
    for tokens, mask in zip(every.tokens, every.mask, strict=True):
        with torch.no_grad():
            model(tokens[mask].unsqueeze(0))
    return seen


def truth(seen: Mixed, statistic: Statistic) -> Values:
    def reduced(samples: list[Tensor]) -> Tensor:
        per_sample = [REDUCE[statistic.sequence](a.double()) for a in samples]
        return REDUCE[statistic.batch](torch.stack(per_sample))

    values: Values = {"experts": {}, "expert_ffn": {}}
    for layer, found in enumerate(seen):
        given, sent = (torch.cat([sample[key] for sample in found]).double() for key in ("given", "sent"))
        values["experts"][layer] = given.norm(dim=-1).sum(0) / sent.sum(0)
        values["expert_ffn"][layer] = reduced([sample["neurons"].flatten(1) for sample in found])
        if "shared" in found[0]:
            values.setdefault("shared_ffn", {})[layer] = reduced([sample["shared"] for sample in found])
    return values


Mixtures = Callable[[str], tuple[Path, Mixed]]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixtures:
    """Return a function kind -> (folder, outputs of the experts); each is made once."""
    root = tmp_path_factory.mktemp("mixtures")

    @cache
    def made(kind: str) -> tuple[Path, Mixed]:
        folder = make_folder(root / kind, kind, num_hidden_layers=LAYERS)
        return folder, by_hand(folder, kind)

    return made


def sweep(topology: Topology, folder: Path, statistics: list[Statistic]) -> list[Scores]:
    model, batches = load_hf(folder, topology), share(samples(SAMPLES), topology, 3)
    return [score(model, batches, topology=topology, statistic=statistic) for statistic in statistics]


CASES = [
    *(("qwen2_moe", layout) for layout in LAYOUTS),  # the one with shared experts
    *(("mixtral", layout) for layout in ("tp1", "tp2-pp2", "ep2-tp2")),
]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_scores_are_the_naive_truth(pool: Pool, mixture: Mixtures, kind: str, layout: str) -> None:
    folder, seen = mixture(kind)
    statistics = NINE if layout == "tp1" else EVERYWHERE
    ranks = pool.run(sweep, folder, statistics, **LAYOUTS[layout])
    shape = read_config(folder).shape
    for statistic, *found in zip(statistics, *ranks, strict=True):
        want = truth(seen, statistic)
        scores = found[0]
        assert set(scores.values) == {"heads", "hidden", *want}
        expect_truth(Scores({axis: scores.values[axis] for axis in want}, shape, statistic, 0, 0, ""), want)
        for other in found[1:]:
            for axis, layers in other.values.items():
                assert all(torch.equal(units, scores.values[axis][layer]) for layer, units in layers.items())


def test_grouped_experts_say_how_to_build_the_model() -> None:
    layer: Any = SimpleNamespace(layer_number=3, mlp=SimpleNamespace(experts=torch.nn.Identity()))
    with pytest.raises(PlanError) as caught:
        Mixture(layer, Statistic(), ("experts",), Topology(), lambda: torch.ones(1, 1, dtype=torch.bool))
    assert str(caught.value) == (
        "the experts of layer 2 are Identity, but scoring needs one module per expert. Build the model with "
        "moe_grouped_gemm=False."
    )
