"""Loss masks of chats reach the losses of every phase, split over context-parallel ranks, and survive a resume."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.data import Batch
from minitron_megatron.events import Event, silent
from minitron_megatron.files import read_json
from minitron_megatron.losses import KDLoss
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe, resolved
from minitron_megatron.run import run
from minitron_megatron.run.context import Context
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.testing import Pool
from tests.losses.cases import naive
from tests.run.test_run import copy_until
from tests.tiny import SHAPE, Stop, transformer

Write = Callable[..., Path]

TEMPLATE = (
    "{% for m in messages %}{{ ('w1 ' if m.role == 'user' else 'w2 ') + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
)
ANSWERS = 61
"""First token that only the assistant writes; 0 ends a conversation, and nothing else."""
STILL = {
    "tokens": 3 * 4 * 16,
    "global_batch": 4,
    "micro_batch": 2,
    "warmup_steps": 1,
    "lr": 1e-9,
    "min_lr": 0.0,
    "save_every": 2,
}
SECOND = {"tokens": 6 * 4 * 32, "sequence": 32, "lr": 5e-3}


@pytest.fixture
def recipe_of(recipe_file: Write, material: Path, tmp_path: Path) -> Write:
    model, chats = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(material / "model", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    draw = random.Random(0)

    def turn(role: str, first: int, last: int) -> dict[str, str]:
        words = [f"w{draw.randrange(first, last)}" for _ in range(draw.randrange(2, 12))]
        return {"role": role, "content": " ".join(words)}

    def conversation() -> list[dict[str, str]]:
        turns = [turn("user", 3, ANSWERS), turn("assistant", ANSWERS, SHAPE.vocab)]
        return turns + (
            [turn("user", 3, ANSWERS), turn("assistant", ANSWERS, SHAPE.vocab)] if draw.random() < 0.5 else []
        )

    chats.write_text("".join(json.dumps({"messages": conversation()}) + "\n" for _ in range(120)))

    def write(name: str, **changes: Any) -> Path:
        data = {"sequence": 16, "sources": [{"path": str(chats), "format": "chat", "validation": 0.2}]}
        prune = {"hidden": 32, "ffn": 48, "by": "first"}
        keys = {"model": str(model), "data": data, "correct": None, "random_baseline": False, "prune": prune}
        distill = STILL | {"phases": [SECOND]}
        return recipe_file(f"{name}.yaml", **keys, distill=distill, out=str(tmp_path / name), **changes)

    return write


def distilled(topology: Topology, recipe: Path, stop_at: int = 0) -> list[float]:
    """Run until the student is distilled, or stopped; return the losses of distillation."""
    losses: list[float] = []

    def listen(event: Event) -> None:
        if event.label == "distill" and "loss" in event.values:
            losses.append(event.values["loss"])
            if event.done == stop_at:
                raise Stop

    keys = load_recipe(recipe)
    try:
        for stage in ("prepare", "prune", "distill"):
            run(keys, topology, only=stage, listener=listen)
    except Stop:
        pass
    return losses


def first_batches(topology: Topology, recipe: Path) -> list[list[Batch]]:
    """Return all samples of the first step of each phase."""
    keys = load_recipe(recipe)
    done = {path.stem: read_json(path)["result"] for path in RunFolder(keys.out).record_paths()}
    context, phases = Context(keys, topology, silent, done, str), resolved(keys.distill, keys.data)
    return [context.training_batches(phase, keys.seed + number)(0) for number, phase in enumerate(phases)]


def naive_loss(batches: list[Batch], teacher: Any, student: Any) -> float:
    """Return the divergence per token that the assistant wrote, each document by itself."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            for piece in torch.tensor_split(torch.arange(len(tokens)), (tokens == 0).nonzero()[:, 0] + 1):
                counts = counted(tokens[piece], labels[piece])
                if counts.any():
                    ours, theirs = (model(tokens[None, piece]).logits[0][counts] for model in (student, teacher))
                    total, count = total + naive(KDLoss(), ours, theirs), count + int(counts.sum())
    return float(total / count)


def counted(tokens: Tensor, labels: Tensor) -> Tensor:
    return ((labels >= ANSWERS) | (labels == 0)) & (tokens != 0)


@torch.no_grad()
def test_masks_hold_in_each_phase_at_cp2_and_through_a_resume(pool: Pool, recipe_of: Write) -> None:
    whole, stopped, layout = recipe_of("whole"), recipe_of("stopped"), {"dp": 2, "cp": 2}
    losses = pool.run(distilled, whole, **layout)[0]
    assert len(losses) == 9
    out, batches = load_recipe(whole).out, pool.run(first_batches, whole)[0]
    for phase, length in zip(batches, (16, 32), strict=True):
        for batch in phase:
            assert batch.tokens.shape[1] == length and batch.mask.equal(counted(batch.tokens, batch.labels))
            assert 0.2 < batch.mask.float().mean() < 0.8 and batch.attention_context
    models = transformer(load_recipe(whole).model), transformer(out / "pruned")
    for step, phase in ((0, batches[0]), (3, batches[1])):
        assert losses[step] == pytest.approx(naive_loss(phase, *models), rel=1e-4)
    copy_until(whole, stopped, "distill")
    before = pool.run(distilled, stopped, 8, **layout)[0]
    after = pool.run(distilled, stopped, **layout)[0]
    assert before == losses[:8] and after == losses[-len(after) :] and 1 <= len(after) < 6
    hashes = {
        read_json(load_recipe(each).out / "stages" / "distill.json")["result"]["hash"] for each in (whole, stopped)
    }
    assert len(hashes) == 1
