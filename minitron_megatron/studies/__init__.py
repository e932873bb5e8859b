"""Studies: comparisons of arms over seeds, each a YAML file of this folder, expanded into runs and drawn as a table.

Knows: recipes, runs, reports. Must not know: command lines, what stages do.
"""

from .jobs import LAST, Job, Plan, check_job, plan_study, share_of
from .study import Study, load_study, shipped
from .table import collect, is_done, sign_test
from .write import describe_studies, plan_rows, write_study

__all__ = [
    "LAST",
    "Job",
    "Plan",
    "Study",
    "check_job",
    "collect",
    "describe_studies",
    "is_done",
    "load_study",
    "plan_rows",
    "plan_study",
    "share_of",
    "shipped",
    "sign_test",
    "write_study",
]
