"""Documents packed into one sample, with attention kept inside each, train as if each came alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.convert import load_hf
from minitron_megatron.data import Batch
from minitron_megatron.distill import KDObjective
from minitron_megatron.model import forward_backward, named_shards
from minitron_megatron.parallel import AttentionContext, Topology
from minitron_megatron.score import score
from minitron_megatron.testing import Pool
from minitron_megatron.train import LMObjective, Training, train
from tests.tiny import CONTEXT, LAYOUTS, SEQUENCE, SHAPE, note, samples, share, transformer

ENDS = ((2, 7), (), (0, 11), (5,))
"""Ends of the documents in each sample, as positions; the last document of a sample continues."""
Found = tuple[float, dict[str, Tensor]]


def packed(count: int = 8, seed: int = 0) -> Batch:
    every = samples(count, seed, padded=False)
    documents = torch.zeros_like(every.tokens)
    for row in range(count):
        for end in ENDS[row % len(ENDS)]:
            documents[row, end + 1 :] += 1
    mask = every.mask.clone()
    mask[:, :-1] &= documents[:, 1:] == documents[:, :-1]
    return replace(every, mask=mask, attention_context=AttentionContext(documents))


def passes(topology: Topology, folder: Path, teacher: Path | None, recompute: Any) -> Found:
    model = load_hf(folder, topology, recompute=recompute)
    batches = share(packed(), topology)
    objective: Any = LMObjective(topology)
    if teacher:
        objective = KDObjective(load_hf(teacher, topology), topology, vocab=SHAPE.vocab)
    objective.prepare(batches)
    loss, _ = forward_backward(model, batches, objective.loss)
    found = {each.name: each.tensor.grad for each in named_shards(model) if "norm" in each.name}
    return float(loss), {name: gradient for name, gradient in found.items() if gradient is not None}


def alone(model: Any, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return (logits, labels) of each document on its own, at the positions whose loss counts."""
    out = []
    for row in range(len(batch.tokens)):
        for number in batch.attention_context.documents[row].unique():
            of = batch.attention_context.documents[row] == number
            logits = model(batch.tokens[row, of][None]).logits[0]
            counts = batch.mask[row, of]
            out.append((logits[counts], batch.labels[row, of][counts]))
    return out


@pytest.mark.parametrize(
    ("layout", "recompute"), [("tp1", "none"), ("pp2-vp2", "none"), ("tp2-pp2", "none"), ("tp2-sp", "full")]
)
@pytest.mark.parametrize("distilled", [False, True])
def test_packing_changes_nothing(
    pool: Pool, checkpoints: dict[str, Path], layout: str, recompute: str, distilled: bool
) -> None:
    """Return the loss and the gradients of the norms, which depend on everything in their layers."""
    teacher = checkpoints["untied"] if distilled else None
    folder, batch = checkpoints["student" if distilled else "untied"], packed()
    truth, loss = transformer(folder), torch.zeros(())
    taught = alone(transformer(teacher), batch) if teacher else []
    for number, (logits, labels) in enumerate(alone(truth, batch)):
        log_p = logits.log_softmax(-1)
        if teacher:
            log_q = taught[number][0].detach().log_softmax(-1)
            loss = loss + (log_q.exp() * (log_q - log_p)).sum()
        else:
            loss = loss - log_p.gather(1, labels[:, None]).sum()
    (loss / batch.mask.sum()).backward()
    gradients = {
        f"decoder.layers.{at}.{mcore_name}.weight": getattr(layer, hf_name).weight.grad
        for at, layer in enumerate(truth.model.layers)
        for mcore_name, hf_name in (
            ("input_layernorm", "input_layernorm"),
            ("pre_mlp_layernorm", "post_attention_layernorm"),
        )
    } | {"decoder.final_layernorm.weight": truth.model.norm.weight.grad}
    seen, losses = set(), []
    for found, norms in pool.run(passes, folder, teacher, recompute, **LAYOUTS[layout]):
        losses.append(found)
        for name, gradient in norms.items():
            seen.add(name)
            if not layout.endswith("sp"):  # there each rank of tp has its part of the sum
                expected = gradients[name] * batch.mask.sum()
                torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert max(losses) == pytest.approx(loss.item(), rel=1e-5)
    assert seen == set(gradients)


def curve(topology: Topology, folder: Path, teacher: Path, recompute: Any) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of three steps."""
    seen: list[dict[str, float]] = []
    train(
        load_hf(folder, topology, recompute=recompute),
        KDObjective(load_hf(teacher, topology), topology, vocab=SHAPE.vocab),
        lambda step: share(packed(seed=step), topology),
        Training(steps=3, lr=2e-3),
        topology,
        listener=note(seen),
    )
    return [(step["loss"], step["grad_norm"]) for step in seen]


@pytest.mark.parametrize(("layout", "recompute"), [("cp2-tp2-sp", "none"), ("cp2-pp2-vp2", "none"), ("cp2", "full")])
def test_ranks_that_share_sequences_keep_their_documents_apart(
    pool: Pool, checkpoints: dict[str, Path], layout: str, recompute: str
) -> None:
    models = checkpoints["student"], checkpoints["untied"]
    alone = pool.run(curve, *models, "none")[0]
    for found in pool.run(curve, *models, recompute, **CONTEXT[layout]):
        assert [*sum(found, ())] == pytest.approx([*sum(alone, ())], rel=1e-5)


def measured(topology: Topology, folder: Path, separate: bool) -> Tensor:
    batches = share(packed(), topology)
    batches = batches if separate else [replace(batch, attention_context=None) for batch in batches]
    return score(load_hf(folder, topology), batches, topology=topology).values["hidden"][None]


def test_importance_is_that_of_documents_apart(pool: Pool, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["untied"]
    separate, together, split = (
        pool.run(measured, folder, separate, tp=tp)[0] for separate, tp in ((True, 1), (False, 1), (True, 2))
    )
    torch.testing.assert_close(separate, split, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(separate, together, rtol=1e-3)
    assert max(max(ends, default=0) for ends in ENDS) < SEQUENCE
