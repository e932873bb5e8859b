"""Losses over pairs: by hand, against a float64 truth from transformers, and at every layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minitron_megatron.align import PairLoss, PreferenceObjective, measure_reference
from minitron_megatron.align.pairs import PairFile, step_pairs, tokenize_pairs
from minitron_megatron.convert import load_hf
from minitron_megatron.data import PreferencePair
from minitron_megatron.errors import DataError
from minitron_megatron.events import silent
from minitron_megatron.losses import PREFERENCE_LOSSES, Pairs
from minitron_megatron.model import forward_backward, named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.tiny import CONTEXT, EVERY, LAYOUTS, SHAPE, transformer

COUNT = 8
KEYS = {
    "dpo": PairLoss(beta=0.3),
    "smoothed": PairLoss(beta=0.3, label_smoothing=0.1, sft_weight=0.01),
    "ipo": PairLoss("ipo", beta=0.5),
    "rpo_bwd_kl": PairLoss("rpo_bwd_kl", beta=0.3, eta=0.7),
    "rpo_fwd_kl": PairLoss("rpo_fwd_kl", beta=0.3, eta=0.7),
    "rpo_sq": PairLoss("rpo_sq", beta=0.3, eta=0.7),
}


def pairs() -> list[PreferencePair]:
    """Return ragged pairs: two share a prompt, and one has a response of one token."""
    draw = np.random.default_rng(3)
    made = []
    for number in range(COUNT):
        prompt = made[0].prompt if number == 1 else draw.integers(1, SHAPE.vocab, draw.integers(1, 9))
        chosen, rejected = (draw.integers(1, SHAPE.vocab, size) for size in draw.integers(1, 8, 2))
        made.append(PreferencePair(prompt, chosen, rejected, (draw.normal(), draw.normal()), f"pair {number}"))
    return made


def written(folder: Path) -> Path:
    path = folder / "pairs.safetensors"
    tokenize_pairs(pairs(), path, sequence=64, vocab=SHAPE.vocab, rewarded=True, held_out=0, seed=0)
    return path


def likelihood(model: Any, prompt: Tensor, response: Tensor) -> Tensor:
    """Return log p of a response on its own, without padding."""
    row = torch.cat([prompt, response])[None]
    log_p = model(row[:, :-1]).logits[0].log_softmax(-1)
    return log_p.gather(1, row[0, 1:, None])[len(prompt) - 1 :].sum()


def likelihoods(model: Any) -> Tensor:
    """Return log p of all responses: [pairs, 2]."""
    rows = [
        [
            likelihood(model, torch.from_numpy(p.prompt), torch.from_numpy(response))
            for response in (p.chosen, p.rejected)
        ]
        for p in pairs()
    ]
    return torch.stack([torch.stack(row) for row in rows])


def truth(name: str, keys: PairLoss, pi: Tensor, reference: Tensor) -> Tensor:
    """Return the mean loss by the formulas as printed."""
    rewards = torch.tensor([p.rewards for p in pairs()], dtype=torch.float64)
    gap = (pi - reference)[:, 0] - (pi - reference)[:, 1]
    a, b = keys.beta * gap, keys.eta * (rewards[:, 0] - rewards[:, 1])
    s = torch.sigmoid
    found = {
        "dpo": lambda: -torch.log(s(a)),
        "smoothed": lambda: -0.9 * torch.log(s(a)) - 0.1 * torch.log(s(-a)) - 0.01 * pi[:, 0],
        "ipo": lambda: (gap - 1 / (2 * keys.beta)) ** 2,
        "rpo_bwd_kl": lambda: s(b) * torch.log(s(b) / s(a)) + (1 - s(b)) * torch.log((1 - s(b)) / (1 - s(a))),
        "rpo_fwd_kl": lambda: s(a) * torch.log(s(a) / s(b)) + (1 - s(a)) * torch.log((1 - s(a)) / (1 - s(b))),
        "rpo_sq": lambda: (a - b) ** 2,
    }
    return found[name]().mean()


OUTPUT = "output_layer.weight"


def passes(topology: Topology, folder: Path, before: Path, path: Path, names: list[str]) -> dict[str, Any]:
    """Return the reference, and for each loss its sum, its measurements and gradients of norms and output layer."""
    file = PairFile(path)
    reference = measure_reference(load_hf(before, topology), file, topology, micro_batch=1, listener=silent)
    found: dict[str, Any] = {"reference": reference, "tp_rank": topology.tp_rank}
    for name in names:
        model = load_hf(folder, topology)
        batches = list(step_pairs(file, reference, np.arange(COUNT), 1, topology))
        objective = PreferenceObjective(topology, KEYS[name])
        loss, count = forward_backward(model, batches, objective.loss)
        wanted = (each for each in named_shards(model) if "norm" in each.name or each.name == OUTPUT)
        shards = {each.name: each.tensor.grad for each in wanted}
        gradients = {key: gradient for key, gradient in shards.items() if gradient is not None}
        found[name] = (float(loss), int(count), objective.finish(), gradients)
    return found


MCORE = {
    "input_layernorm": "decoder.layers.{}.input_layernorm.weight",
    "post_attention_layernorm": "decoder.layers.{}.pre_mlp_layernorm.weight",
    "norm": "decoder.final_layernorm.weight",
    "lm_head": OUTPUT,
}
"""Module in transformers -> name of its weight in mcore; {}: the layer."""


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, Any]:
    with torch.no_grad():
        reference = likelihoods(transformer(checkpoints["student"]).double())
    found: dict[str, Any] = {"reference": reference}
    model = transformer(checkpoints["untied"]).double()
    pi = likelihoods(model)
    for name, keys in KEYS.items():
        loss = truth(name, keys, pi, reference)
        named = {}
        for key, weight in model.named_parameters():
            *path, module, _ = key.split(".")
            if module in MCORE:
                named[MCORE[module].format(path[-1] if path else "")] = weight
        gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        found[name] = (loss.detach(), dict(zip(named, gradients, strict=True)))
    found["gains"] = (pi - reference).detach()
    return found


@pytest.mark.parametrize("layout", [*EVERY, "cp2-tp2-sp"])
def test_losses_at_every_layout(
    pool: Pool, checkpoints: dict[str, Path], tmp_path: Path, expected: dict[str, Any], layout: str
) -> None:
    names, tp = list(KEYS) if layout == "tp1" else ["smoothed", "rpo_bwd_kl"], (LAYOUTS | CONTEXT)[layout].get("tp", 1)
    arguments = (checkpoints["untied"], checkpoints["student"], written(tmp_path), names)
    ranks = pool.run(passes, *arguments, **(LAYOUTS | CONTEXT)[layout])
    for found in ranks:
        torch.testing.assert_close(
            torch.from_numpy(found["reference"]).double(), expected["reference"], atol=2e-5, rtol=2e-6
        )
    for name in names:
        losses, counts, measured, gradients = zip(*(found[name] for found in ranks), strict=True)
        assert sum(counts) == COUNT * tp
        assert sum(losses) / tp / COUNT == pytest.approx(float(expected[name][0]), rel=2e-5)
        assert measured[0] == measured[-1]
        gains = expected["gains"]
        assert measured[0]["preference_accuracy"] == float((gains[:, 0] > gains[:, 1]).double().mean())
        assert measured[0]["kl_to_reference"] == pytest.approx(-float(gains.mean()), rel=1e-4)
        for key, gradient in expected[name][1].items():
            if key == OUTPUT:
                parts = [
                    sum(found[name][3].get(key, 0) for found in ranks if found["tp_rank"] == at) for at in range(tp)
                ]
                whole = torch.cat(parts)[: SHAPE.vocab]
            else:  # with sequence parallelism each rank of tp has its part of the sum
                whole = sum(rank[key] for rank in gradients if key in rank) / (1 if layout.endswith("sp") else tp)
            scale = float(gradient.abs().max()) * COUNT
            torch.testing.assert_close(whole.double(), gradient * COUNT, rtol=1e-4, atol=2e-5 * scale)


def test_a_token_that_the_model_lacks_is_refused_by_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pair \d has the token \d+, and the model has 100 entries"):
        path = tmp_path / "pairs.safetensors"
        tokenize_pairs(pairs(), path, sequence=64, vocab=100, rewarded=True, held_out=0, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_table_by_hand() -> None:
    """Six pairs at beta 1 and eta 1: (gap, gap of the rewards) -> each loss, computed with a pocket calculator."""
    gap = torch.tensor([0.0, 0.0, 1.0, -1.0, 2.0, math.log(3)], dtype=torch.float64)
    rewards = torch.tensor([0.0, math.log(3), 1.0, 1.0, 0.0, -math.log(3)], dtype=torch.float64)
    by_hand = {
        "dpo": [0.6931472, 0.6931472, 0.3132617, 1.3132617, 0.1269280, 0.2876821],
        "ipo": [0.25, 0.25, 0.25, 2.25, 2.25, 0.3583367],
        "rpo_bwd_kl": [0.0, 0.1308120, 0.0, 0.4621172, 0.4337808, 0.5493061],
        "rpo_fwd_kl": [0.0, 0.1438410, 0.0, 0.4621172, 0.3278133, 0.5493061],
        "rpo_sq": [0.0, 1.2069490, 0.0, 4.0, 4.0, 4.8277959],
    }
    for name, values in by_hand.items():
        found = PREFERENCE_LOSSES[name](Pairs(gap, rewards, beta=1.0))
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), atol=1e-6, rtol=0)


def test_dpo_is_that_of_trl() -> None:
    """Gaps of the pairs of this file at beta 0.3, and the loss of TRL 1.16.0's DPOTrainer (tests/compat/trl_dpo.py)."""
    gap = [-3.59643, 0.20855, -1.42185, -0.6391, 4.30243, -5.98382, -2.05079, -3.71113]
    pairs = Pairs(torch.tensor(gap, dtype=torch.float64), torch.full((8,), torch.nan), beta=0.3)
    assert float(PREFERENCE_LOSSES["dpo"](pairs).mean()) == pytest.approx(1.0491307, abs=2e-6)


def test_rpo_tends_to_dpo() -> None:
    gap = torch.linspace(-3, 3, 7, dtype=torch.float64)
    dpo = PREFERENCE_LOSSES["dpo"](Pairs(gap, gap, beta=0.5))
    distance = [
        float((PREFERENCE_LOSSES["rpo_bwd_kl"](Pairs(gap, torch.full_like(gap, b), beta=0.5)) - dpo).abs().max())
        for b in (4.0, 8.0, 16.0, 32.0)
    ]
    assert distance == sorted(distance, reverse=True) and distance[-1] < 1e-6


@pytest.mark.parametrize("name", ["rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"])
def test_equal_rewards_pull_the_gap_to_zero(name: str) -> None:
    """At b = 0 the gradients are beta (s(a) - 1/2), beta s(a) s(-a) a and 2 beta a."""
    gap = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64, requires_grad=True)
    PREFERENCE_LOSSES[name](Pairs(gap, torch.zeros(3, dtype=torch.float64), beta=0.4)).sum().backward()
    a = 0.4 * gap.detach()
    derived = {
        "rpo_bwd_kl": 0.4 * (a.sigmoid() - 0.5),
        "rpo_fwd_kl": 0.4 * a.sigmoid() * (-a).sigmoid() * a,
        "rpo_sq": 0.8 * a,
    }
    torch.testing.assert_close(gap.grad, derived[name])
