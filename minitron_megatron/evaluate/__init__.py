"""How good a model is: its loss on text that it was not trained on, and tasks of lm-evaluation-harness.

Knows: models, held-out batches, the harness. Must not know: how a model came about, recipes.
"""

from .losses import ValidationSet, validation_loss
from .own import PROGRAMS
from .predict import Predictor, Run
from .suites import SUITES, Task
from .tasks import check_tasks, lower_is_better, run_tasks, scores_of

__all__ = [
    "PROGRAMS",
    "SUITES",
    "Predictor",
    "Run",
    "Task",
    "ValidationSet",
    "check_tasks",
    "lower_is_better",
    "run_tasks",
    "scores_of",
    "validation_loss",
]
