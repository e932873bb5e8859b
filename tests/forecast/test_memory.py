"""Estimated bytes per rank are within a tenth of the memory measured in a distillation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.convert import load_hf
from minitron_megatron.data import Batch
from minitron_megatron.distill import KDObjective
from minitron_megatron.forecast import estimate
from minitron_megatron.layout import Shape
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.testing import Pool
from minitron_megatron.train import Training
from minitron_megatron.train.learner import Learner
from tests.tiny import write_llama

SHAPE = Shape(layers=4, hidden=256, ffn=512, heads=8, kv_groups=4, head_dim=32, vocab=1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def live_bytes() -> int:
    """Return the bytes of all reachable tensor storages, each counted once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


STUDENT = SHAPE.resized(hidden=128, ffn=256, heads=4)
SAMPLES, SEQUENCE = 64, 128


def held_in_distillation(topology: Topology, teacher: Path, student: Path, dtype: str) -> int:
    """Return the bytes of this rank's tensors after a distillation step, including the teacher's hidden states."""
    before = live_bytes()
    teaches, learns = (load_hf(each, topology, DTYPES[dtype]) for each in (teacher, student))
    learner = Learner(learns, Training(steps=2, lr=1e-3, min_lr=1e-4, warmup_steps=0), topology)
    tokens = torch.randint(0, SHAPE.vocab, (2, SEQUENCE + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, SEQUENCE, dtype=torch.bool))
    objective = KDObjective(teaches, topology, vocab=SHAPE.vocab)
    learner.step([batch.shared(topology)] * (SAMPLES // 2 // topology.replicas), objective)
    held = live_bytes() - before
    learner.release()
    return held


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ({"tp": 2, "sequence_parallel": True}, "bfloat16"),
        ({"pp": 2}, "float32"),
        ({"dp": 2}, "bfloat16"),
        ({"dp": 2, "cp": 2}, "float32"),
    ],
    ids=["tp2-sp", "pp2", "dp2", "cp2"],
)
def test_an_estimate_is_what_the_fullest_rank_of_a_distillation_holds(
    pool: Pool, tmp_path: Path, recipe_file: Callable[..., Path], layout: dict[str, Any], dtype: str
) -> None:
    """`minitron estimate` counts both models, gradients, optimizer and the teacher's hidden states."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one " * 10_000)
    teacher, student = write_llama(tmp_path / "teacher", SHAPE, 1), write_llama(tmp_path / "student", STUDENT, 2)
    recipe = recipe_file(
        model=str(teacher),
        dtype=dtype,
        correct=None,
        parallel={key: value for key, value in layout.items() if key != "dp"},
        data={"sequence": SEQUENCE, "beyond_positions": True, "sources": [{"path": str(corpus)}]},
        prune={"hidden": 128, "ffn": 256, "heads": 4},
        distill={"tokens": SAMPLES * SEQUENCE * 2, "global_batch": SAMPLES, "micro_batch": 2, "warmup_steps": 0},
    )
    planned = estimate(load_recipe(recipe), gpus=2)
    assert planned.stash_bytes > 0.1 * planned.rank_bytes
    held = max(pool.run(held_in_distillation, teacher, student, dtype, **layout))
    assert abs(held / planned.rank_bytes - 1) < 0.1, f"{held:,} held, {planned.rank_bytes:,} planned"
