"""Progress, metrics, tables, plots and the HTML report of a run.

Knows: events, the names of files in a run folder, rich and matplotlib (imported when a plot is drawn). Must not know:
weights, processes, recipes.
"""

from .compared import compare_runs
from .listeners import MetricsFile, Progress, fan_out, read_metrics
from .loggers import logged
from .machine import Machine
from .made import made_by
from .page import write_report
from .plots import BenchRow, plot_bench, plot_study
from .records import describe, pairs_table, report_run, text_table
from .rehearsal_page import write_rehearsal
from .rehearsed import rehearsal_tables
from .searched import SearchTable
from .studied import (
    ArmResult,
    Compared,
    Ranks,
    StudyTable,
    Verdict,
    study_markdown,
    study_notes,
    study_page,
    study_text,
)
from .tables import bench_tables, candidates_table, print_summary
from .terminal import front_table, memory_table
from .watch import watch
from .watchdog import Watchdog

__all__ = [
    "ArmResult",
    "BenchRow",
    "Compared",
    "Machine",
    "MetricsFile",
    "Progress",
    "Ranks",
    "SearchTable",
    "StudyTable",
    "Verdict",
    "Watchdog",
    "bench_tables",
    "candidates_table",
    "compare_runs",
    "describe",
    "fan_out",
    "front_table",
    "logged",
    "made_by",
    "memory_table",
    "pairs_table",
    "plot_bench",
    "plot_study",
    "print_summary",
    "read_metrics",
    "rehearsal_tables",
    "report_run",
    "study_markdown",
    "study_notes",
    "study_page",
    "study_text",
    "text_table",
    "watch",
    "write_rehearsal",
    "write_report",
]
