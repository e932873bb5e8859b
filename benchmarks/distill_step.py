"""Cost of a distillation step, compared with its parts: a teacher's forward pass and a student's training step.

    python benchmarks/distill_step.py

Bound: 1.15 of the sum of one teacher forward (to the final hidden states) and one student forward and backward with
cross-entropy, over the same micro-batches. Each repeat measures the parts, the whole and the parts again; one thread;
medians. CPU time is recorded too, since other load on the machine distorts wall time.
"""

from __future__ import annotations

from statistics import median

import torch
from clock import seconds
from record import record

from minitron_megatron.data import Batch
from minitron_megatron.distill import KDObjective
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig, build, fill_initial, forward_only
from minitron_megatron.parallel import Topology
from minitron_megatron.train import Learner, LMObjective, Objective, Training

TEACHER = Shape(layers=8, hidden=512, ffn=1408, heads=8, kv_groups=2, head_dim=64, vocab=8192)
STUDENT = TEACHER.resized(hidden=384, ffn=896)
SEQUENCE, BATCHES, REPEATS, BOUND = 512, 4, 5, 1.15


def main() -> None:
    torch.set_num_threads(1)
    topology = Topology.start()
    models = []
    for seed, shape in enumerate((TEACHER, STUDENT)):
        models.append(build(ModelConfig(shape), topology))
        fill_initial(models[-1], topology, seed)
    teacher, student = models
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, TEACHER.vocab, (BATCHES, 1, SEQUENCE + 1), generator=draw)
    batches = [Batch(each[:, :-1], each[:, 1:], torch.ones(1, SEQUENCE, dtype=torch.bool)) for each in tokens]
    objectives: list[Objective] = [LMObjective(topology), KDObjective(teacher, topology, vocab=TEACHER.vocab)]
    learner = Learner(student, Training(steps=1000), topology)

    def parts() -> None:
        forward_only(teacher, batches)
        learner.step(batches, objectives[0])

    def whole() -> None:
        learner.step(batches, objectives[1])

    parts(), whole()
    ratios: list[tuple[float, ...]] = []
    for _ in range(REPEATS):
        before, mine, after = seconds(parts), seconds(whole), seconds(parts)
        ratios.append(tuple(2 * m / (b + a) for m, b, a in zip(mine, before, after, strict=True)))
    walls, cpus = zip(*ratios, strict=True)
    record(
        "distill_step",
        teacher=vars(TEACHER),
        student=vars(STUDENT),
        sequence=SEQUENCE,
        micro_batches=BATCHES,
        wall=median(walls),
        wall_all=walls,
        cpu=median(cpus),
        bound=BOUND,
    )


if __name__ == "__main__":
    main()
