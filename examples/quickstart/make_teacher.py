"""Reproduce the quickstart's teacher: a small Llama trained by this package's loop on CPython's standard library.

    python examples/quickstart/make_teacher.py WORK [--steps N]

writes corpora, tokens and checkpoints to WORK and the teacher to `examples/quickstart/teacher`. It can be resumed.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import corpus as corpora
import tokenizer as tokenizers
import torch

from minitron_megatron.convert import save_hf
from minitron_megatron.data import Batch, Corpus, prepare, step_batches
from minitron_megatron.layout import Shape
from minitron_megatron.model import Chunk, ModelConfig, build, fill_initial
from minitron_megatron.parallel import Topology
from minitron_megatron.report import MetricsFile, Progress, fan_out
from minitron_megatron.train import LMObjective, Saving, Training, mean_loss, train

BLEND = {"code": 0.9, "prose": 0.1}
"""Blend of the teacher's training: mostly code. The quickstart distils on prose, so that teacher correction matters."""
HF = {"model_type": "llama", "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


@dataclass(frozen=True)
class Teacher:
    """A Llama to train from random weights."""

    shape: Shape
    write_text: Callable[[Path], object]
    """Writes the corpora, as `corpus.py` does, to a folder."""
    lr: float = 2e-3
    """Peak learning rate; the last one is a hundredth of it."""
    sequence: int = 256
    batch: int = 16
    dtype: torch.dtype = torch.float32
    """bfloat16 computes in bfloat16, and keeps weights and gradients in fp32 beside it."""
    checkpoint_every: int = 250
    """Steps between checkpoints and validations."""

    def make(self, work: Path, out: Path, steps: int) -> None:
        """Train for `steps` steps, or go on; write corpora and checkpoints to `work` and the model to `out`."""
        topology = Topology.start()
        with Progress() as progress:
            self._write_tokens(work, out, progress)
            model = build(ModelConfig(self.shape, max_positions=1024, source=HF), topology, self.dtype)
            fill_initial(model, topology, seed=1)
            self._train(model, topology, work, steps, progress)
        kept = {path.name: path.read_bytes() for path in out.iterdir()}
        save_hf(model, out, topology, dtype=torch.bfloat16)
        for name, content in kept.items():
            if not (out / name).exists():
                (out / name).write_bytes(content)

    def _write_tokens(self, work: Path, out: Path, progress: Progress) -> None:
        """Write corpora, tokenizer and tokens unless they exist."""
        if (work / "prose.train.bin").exists():
            return
        self.write_text(work)
        tokenizers.save(tokenizers.train(work, self.shape.vocab), out)
        for name in BLEND:
            held_out = [work / f"{name}.valid.jsonl"]
            prepare([work / f"{name}.jsonl"], out, work / name, validation=held_out, listener=progress)

    def _train(self, model: list[Chunk], topology: Topology, work: Path, steps: int, progress: Progress) -> None:
        data = partial(Corpus, sequence=self.sequence, seed=1, cache=work / "index")
        sources = data([(work / name, weight) for name, weight in BLEND.items()], samples=steps * self.batch)
        held_out = {name: data([(work / name, 1.0)], "valid", samples=64) for name in BLEND}
        objective = LMObjective(topology)

        def batches(source: Corpus, step: int) -> list[Batch]:
            return step_batches(source, step, global_batch=self.batch, micro_batch=self.batch, dp_rank=0, dp=1)

        def validate() -> dict[str, float]:
            losses = {
                n: mean_loss(model, [b for i in range(64 // self.batch) for b in batches(c, i)], objective, topology)[0]
                for n, c in held_out.items()
            }
            return {f"loss_{name}": loss for name, loss in losses.items()}

        every = self.checkpoint_every
        train(
            model,
            objective,
            partial(batches, sources),
            Training(
                steps=steps, lr=self.lr, min_lr=self.lr / 100, warmup_steps=100, save_every=every, validate_every=every
            ),
            topology,
            label="teacher",
            saving=Saving(work / "checkpoints", f"teacher {steps}"),
            validate=validate,
            listener=fan_out(progress, MetricsFile(work / "metrics.jsonl")),
        )


QUICKSTART = Teacher(
    Shape(layers=8, hidden=192, ffn=480, heads=8, kv_groups=4, head_dim=32, vocab=1536, tied=True),
    partial(corpora.write, Path(sysconfig.get_path("stdlib"))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the quickstart's teacher.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    QUICKSTART.make(args.work, Path(__file__).parent / "teacher", args.steps)


if __name__ == "__main__":
    main()
