"""Tiny Llamas with irregular sizes, and data for them, for tests of the rooms above `convert`.

transformers writes the checkpoints and computes the expected results, independently of megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.data import Batch
from minitron_megatron.events import Event
from minitron_megatron.layout import Shape
from minitron_megatron.parallel import AttentionContext, Topology

SHAPE = Shape(layers=5, hidden=48, ffn=64, heads=8, kv_groups=2, head_dim=8, vocab=131)
SHAPES = {
    "untied": SHAPE,
    "tied": replace(SHAPE, tied=True),
    "student": replace(SHAPE, layers=4, hidden=32, ffn=48, heads=4),
}
SEQUENCE = 12

LAYOUTS: Mapping[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-vp2": {"pp": 2, "vp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "dp2": {"dp": 2},
}
CONTEXT: Mapping[str, dict[str, Any]] = {
    "cp2": {"dp": 2, "cp": 2},
    "cp2-dp2": {"dp": 4, "cp": 2},
    "cp2-tp2-sp": {"dp": 2, "cp": 2, "tp": 2, "sequence_parallel": True},
    "cp2-pp2-vp2": {"dp": 2, "cp": 2, "pp": 2, "vp": 2},
    "cp2-tp2-pp2": {"dp": 2, "cp": 2, "tp": 2, "pp": 2},
}
"""Context-parallel layouts, for training only."""
EVERY = tuple(name for name in LAYOUTS if name not in ("tp2", "pp2"))
"""Layouts for what must hold at each: tensor parallelism without sequence parallelism, and stages of one chunk, are
parts of tp2-pp2."""
each_layout = pytest.mark.parametrize("layout", EVERY)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return name -> the Hugging Face folder of `SHAPES[name]`."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_llama(root / name, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def write_llama(folder: Path, shape: Shape, seed: int) -> Path:
    """Write a Llama with large random weights, and norm weights that are not all one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_groups,
            head_dim=shape.head_dim,
            max_position_embeddings=64,
            initializer_range=0.15,
            tie_word_embeddings=shape.tied,
        )
    )
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def transformer(folder: Path) -> Any:
    """Return the checkpoint as a transformers model in fp32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def samples(count: int, seed: int = 0, padded: bool = True) -> Batch:
    """Return random sequences; if `padded`, every second one has a random, shorter length."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SHAPE.vocab, (count, SEQUENCE + 1), generator=generator)
    length = torch.full((count,), SEQUENCE)
    if padded:
        length[::2] = torch.randint(2, SEQUENCE, ((count + 1) // 2,), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(SEQUENCE) < length.unsqueeze(1))


def share(every: Batch, topology: Topology, micro_batch: int = 2) -> list[Batch]:
    """Return a data-parallel rank's micro-batches on its device: consecutive samples, split by context parallelism."""
    each = len(every.tokens) // topology.replicas
    starts = range(topology.replica * each, (topology.replica + 1) * each, micro_batch)
    batches = [_rows(every, slice(a, a + micro_batch)) for a in starts]
    return [batch.to(topology.device).shared(topology) for batch in batches]


def _rows(every: Batch, rows: slice) -> Batch:
    context = every.attention_context and AttentionContext(every.attention_context.documents[rows])
    return Batch(every.tokens[rows], every.labels[rows], every.mask[rows], context)


def cross_entropy(model: Any, batch: Batch) -> Tensor:
    """Return a transformers model's cross-entropy in nats per counted token."""
    logits = model(batch.tokens).logits
    return F.cross_entropy(logits[batch.mask], batch.labels[batch.mask])


LossOf = Callable[[Any, Batch], Tensor]


def learning_rate(step: int, training: Any) -> float:
    """Return the learning rate at a step, from 1: linear warm-up to the peak, then cosine decay to `min_lr`."""
    if step <= training.warmup_steps:
        return training.lr * step / training.warmup_steps
    through = (step - training.warmup_steps) / (training.steps - training.warmup_steps)
    cosine = (1 + torch.cos(torch.tensor(torch.pi * through, dtype=torch.float64)).item()) / 2
    return training.min_lr + (training.lr - training.min_lr) * cosine


class Stop(Exception):
    """Simulated kill of a run."""


def note(curve: list[dict[str, float]], stop_at: int | None = None) -> Callable[[Event], None]:
    """Return a listener that appends each step to `curve`, and raises Stop after step `stop_at`."""

    def listen(event: Event) -> None:
        curve.append({"step": event.done, **event.values})
        if event.done == stop_at:
            raise Stop

    return listen


class NaiveOptimizer:
    """Optimizer in plain torch: AdamW, no weight decay for vectors, gradients clipped by the global norm."""

    def __init__(self, model: Any, training: Any) -> None:
        decays = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": decays, "weight_decay": training.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.model, self.training, self.done = model, training, 0
        self.adam = torch.optim.AdamW(groups, betas=(training.beta1, training.beta2), eps=training.eps)

    def step(self, loss: Tensor) -> dict[str, float]:
        """Take a step on `loss` and return its metrics."""
        self.done += 1
        lr = learning_rate(self.done, self.training)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.adam.step()
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}


def naive_training(model: Any, batch_of: Callable[[int], Batch], training: Any, loss_of: LossOf) -> list[dict]:
    """Train `model` in plain torch; return the metrics of each step."""
    optimizer = NaiveOptimizer(model, training)
    return [optimizer.step(loss_of(model, batch_of(step))) for step in range(training.steps)]
