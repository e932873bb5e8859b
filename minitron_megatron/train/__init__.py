"""The training loop of correction, baselines and distillation; the caller passes the objective.

Knows: mcore's DDP, optimizer, scheduler and pipeline schedules. Must not know: teachers, recipes, reports.
"""

from .evaluate import mean_loss
from .frozen import train_norms_only
from .learner import Learner
from .loop import MOST_SKIPPED, Saving, train
from .lora import Lora
from .objective import OBJECTIVES, LMObjective, Objective
from .signals import local_signals
from .training import Training, TrainingSettings

__all__ = [
    "MOST_SKIPPED",
    "OBJECTIVES",
    "LMObjective",
    "Learner",
    "Lora",
    "Objective",
    "Saving",
    "Training",
    "TrainingSettings",
    "local_signals",
    "mean_loss",
    "train",
    "train_norms_only",
]
