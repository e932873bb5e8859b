"""Evaluation of a model: loss on held-out text, tasks of lm-evaluation-harness, and tasks that are conversations.

Knows: models, held-out batches, the harness, chat templates. Must not know: how a model was made, recipes.
"""

from .chat import CHAT_TASKS, NEED_JUDGE, Judge
from .decoding import Decoding, decoding, generation_settings
from .extra_tasks import PROGRAMS
from .generate import MOST_TOKENS
from .losses import ValidationSet, validation_loss
from .predict import Predictor, RunBatches, Sampling
from .programs import which_pass
from .suites import SUITES, Task
from .tasks import HarnessResults, check_tasks, lower_is_better, run_tasks, scores_of

__all__ = [
    "CHAT_TASKS",
    "MOST_TOKENS",
    "NEED_JUDGE",
    "PROGRAMS",
    "SUITES",
    "Decoding",
    "HarnessResults",
    "Judge",
    "Predictor",
    "RunBatches",
    "Sampling",
    "Task",
    "ValidationSet",
    "check_tasks",
    "decoding",
    "generation_settings",
    "lower_is_better",
    "run_tasks",
    "scores_of",
    "validation_loss",
    "which_pass",
]
