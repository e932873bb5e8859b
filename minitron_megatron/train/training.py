"""Settings of a training: optimizer, schedule, checkpoints, steps."""

from __future__ import annotations

from typing import Annotated

from ..settings import Count, Field, HowToRun, NotNegative, Positive, Seed, Settings, Steps, model_validator

__all__ = ["Training", "TrainingSettings"]


class TrainingSettings(Settings):
    """Settings that a user gives, whatever the length of the training. The defaults are the papers'."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    min_lr: NotNegative = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: Steps = 40
    """Steps of linear warm-up."""
    weight_decay: NotNegative = 0.1
    """Weight decay of AdamW."""
    clip: Positive = 1.0
    """Gradient clipping: maximum global norm."""
    save_every: HowToRun[Count] = 100
    """Steps between checkpoints. Only a checkpoint at a validated step can become the best one."""
    keep_checkpoints: HowToRun[Count] = 2
    """Newest checkpoints to keep while the stage runs, in addition to the one with the lowest validation loss."""
    save_async: HowToRun[bool] = True
    """Continue training while a checkpoint is written."""
    validate_every: HowToRun[Count] = 100
    """Steps between validations."""


class Training(TrainingSettings):
    """A training of so many steps. The papers give no constants of Adam: these are NeMo's for these models."""

    steps: Count = Field(kw_only=True)
    beta1: Annotated[float, Field(ge=0, le=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, le=1)] = 0.95
    eps: Positive = 1e-5
    seed: Seed = 0
    """Seed of the objective's random draws; each step is seeded with this plus its number."""

    @model_validator(mode="after")
    def _decays(self) -> Training:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr:g}, above lr, {self.lr:g}. Set it to {self.lr:g} or less")
        return self

    @classmethod
    def of(cls, settings: TrainingSettings, steps: int, seed: int) -> Training:
        """Return a training of `steps` steps."""
        shared = {name: getattr(settings, name) for name in TrainingSettings.model_fields}
        return cls(**shared, steps=steps, seed=seed)
