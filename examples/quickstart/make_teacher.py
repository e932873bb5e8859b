"""Reproduce the quickstart's teacher: a small Llama trained by this package's loop on CPython's standard library.

    python examples/quickstart/make_teacher.py WORK [--steps N]

writes corpora, tokens and checkpoints to WORK and the teacher to `examples/quickstart/teacher`. It can be resumed.
"""

from __future__ import annotations

import argparse
import sysconfig
from functools import partial
from pathlib import Path

import corpus as corpora
import tokenizer as tokenizers
import torch

from minitron_megatron.convert import save_hf
from minitron_megatron.data import Batch, Corpus, prepare, step_batches
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig, build, fill_initial
from minitron_megatron.parallel import Topology
from minitron_megatron.report import MetricsFile, Progress, fan_out
from minitron_megatron.train import LMObjective, Saving, Training, mean_loss, train

TEACHER = Path(__file__).parent / "teacher"
SHAPE = Shape(layers=8, hidden=192, ffn=480, heads=8, kv_groups=4, head_dim=32, vocab=1536, tied=True)
BLEND = {"code": 0.9, "prose": 0.1}
"""Blend of the teacher's training: mostly code. The quickstart distils on prose, so that teacher correction matters."""
SEQUENCE, BATCH = 256, 16
HF = {"model_type": "llama", "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the quickstart's teacher.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    topology = Topology.start()
    with Progress() as progress:
        valid = _tokens(args.work, progress)
        model = build(ModelConfig(SHAPE, max_positions=1024, source=HF), topology)
        fill_initial(model, topology, seed=1)
        data = partial(Corpus, sequence=SEQUENCE, seed=1, cache=args.work / "index")
        sources = data([(args.work / name, weight) for name, weight in BLEND.items()], samples=args.steps * BATCH)
        held_out = {name: data([(args.work / name, 1.0)], "valid", samples=count) for name, count in valid.items()}
        objective = LMObjective(topology)

        def batches(source: Corpus, step: int) -> list[Batch]:
            return step_batches(source, step, global_batch=BATCH, micro_batch=BATCH, dp_rank=0, dp=1)

        def validate() -> dict[str, float]:
            losses = {
                n: mean_loss(model, [b for i in range(len(c) // BATCH) for b in batches(c, i)], objective, topology)[0]
                for n, c in held_out.items()
            }
            return {f"loss_{name}": loss for name, loss in losses.items()}

        training = Training(
            steps=args.steps, lr=2e-3, min_lr=2e-5, warmup_steps=100, save_every=250, validate_every=250
        )
        train(
            model,
            objective,
            partial(batches, sources),
            training,
            topology,
            label="teacher",
            saving=Saving(args.work / "checkpoints", f"teacher {args.steps}"),
            validate=validate,
            listener=fan_out(progress, MetricsFile(args.work / "metrics.jsonl")),
        )
    kept = {path.name: path.read_bytes() for path in TEACHER.iterdir()}
    save_hf(model, TEACHER, topology, dtype=torch.bfloat16)
    for name, content in kept.items():
        if not (TEACHER / name).exists():
            (TEACHER / name).write_bytes(content)


def _tokens(work: Path, progress: Progress) -> dict[str, int]:
    """Write corpora, tokenizer and tokens unless they exist; return the number of held-out sequences by corpus."""
    if not (work / "prose.train.bin").exists():
        corpora.write(Path(sysconfig.get_path("stdlib")), work)
        tokenizers.save(tokenizers.train(work), TEACHER)
        for name in BLEND:
            prepare(
                [work / f"{name}.jsonl"],
                TEACHER,
                work / name,
                validation=[work / f"{name}.valid.jsonl"],
                listener=progress,
            )
    return {name: 64 for name in BLEND}


if __name__ == "__main__":
    main()
