"""Progress, metrics, tables, plots and the HTML report of a run.

Knows: events, the names of files in a run folder, rich and matplotlib (imported when a plot is drawn). Must not know:
weights, processes, recipes.
"""

from .listeners import MetricsFile, Progress, fan_out, read_metrics
from .loggers import logged
from .machine import Machine
from .page import write_report
from .plots import plot_bench
from .records import describe, pairs_table, report_run
from .rehearsed import rehearsal_tables
from .tables import bench_table, candidates_table, print_summary, summary_table
from .watch import watch
from .watchdog import Watchdog

__all__ = [
    "Machine",
    "MetricsFile",
    "Progress",
    "Watchdog",
    "bench_table",
    "candidates_table",
    "describe",
    "fan_out",
    "logged",
    "pairs_table",
    "plot_bench",
    "print_summary",
    "read_metrics",
    "rehearsal_tables",
    "report_run",
    "summary_table",
    "watch",
    "write_report",
]
