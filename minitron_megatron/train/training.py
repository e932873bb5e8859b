"""Settings of a training: steps, optimizer, schedule, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import expect_number

__all__ = ["Training"]


@dataclass(frozen=True)
class Training:
    """Settings of a training. The optimizer's defaults are NeMo's for these models; the papers give none."""

    steps: int
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 40
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    clip: float = 1.0
    """Largest global norm of a step's gradient."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep, besides the best."""
    asynchronous: bool = False
    """Continue training while a checkpoint is written."""
    validate_every: int = 100
    """Steps between validations."""
    seed: int = 0
    """Seed of the objective's random draws; each step is seeded with this plus its number."""

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep", "validate_every"):
            expect_number(name, getattr(self, name), above=0, whole=True)
        expect_number("warmup_steps", self.warmup_steps, at_least=0, whole=True)
        expect_number("seed", self.seed, at_least=0, at_most=2**32 - 1, whole=True)
        for name in ("lr", "clip", "eps"):
            expect_number(name, getattr(self, name), above=0)
        expect_number("min_lr", self.min_lr, at_least=0, at_most=self.lr)
        expect_number("weight_decay", self.weight_decay, at_least=0)
        for name in ("beta1", "beta2"):
            expect_number(name, getattr(self, name), at_least=0, at_most=1)
