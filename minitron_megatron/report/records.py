"""A run's records for the report page and the terminal."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .. import numbers
from ..errors import CheckpointError
from ..files import read_as
from ..records import DepthScores, Plan, Scores, read_status, read_summary
from ..run_folder import RunFolder
from .importance import CUT, KEPT, SCORED, cut_rows, kept_rows, score_rows
from .measured import PREDICTED, predicted_rows
from .page import write_report
from .plots import ByLayer, DepthCurves
from .progress_table import run_state
from .searched import SEARCHED, SearchTable, searched_rows
from .tables import at_dashes, narrow_table, summary_table

__all__ = ["describe", "pairs_table", "report_run", "text_table"]


def report_run(run: Path) -> Path:
    """Write the report of a run folder; return the page's path. Raises CheckpointError if it is not a run folder."""
    folder = RunFolder.existing(run)
    scores, plan, margins, totals = _cut(folder)
    depth = _curves(DepthScores.load(folder.depth)) if folder.depth.is_file() else None
    return write_report(run, scores=scores, plan=plan, margins=margins, totals=totals, depth=depth)


def _cut(run: RunFolder) -> tuple[ByLayer[Sequence[float]], ByLayer[Sequence[int]], ByLayer[float], Mapping[str, int]]:
    """Return (scores, kept units, margins, units before the cut) of a run as plain mappings; empty if it has none."""
    values = _plain(Scores.load(run.scores)) if run.scores.is_file() else {}
    if not run.plan.is_file():
        return values, {}, {}, {}
    plan = Plan.load(run.plan)
    return values, _kept(plan), plan.margins, _totals(plan)


def _kept(plan: Plan) -> ByLayer[Sequence[int]]:
    return {**plan.keep, "layers": {None: plan.kept_layers}}


def _totals(plan: Plan) -> dict[str, int]:
    return {axis: plan.shape.units(axis) for axis in (*plan.keep, "layers")}


def _plain(scores: Scores) -> ByLayer[Sequence[float]]:
    return {axis: {k: v.tolist() for k, v in by.items()} for axis, by in scores.values.items()}


def _curves(depth: DepthScores) -> DepthCurves:
    """Return the depth scores with each block named by its last layer, counted from 1."""
    blocks = {n: {first + n: value for first, value in depth.of_length(n).items()} for n in depth.lengths}
    return DepthCurves(depth.metric, depth.baseline, blocks, [value for _, value in depth.greedy])


def pairs_table(title: str, pairs: Mapping[str, object]) -> Table:
    """Return a table of names and values. Square brackets are plain text, not rich's markup, since paths have them."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for name, value in pairs.items():
        table.add_row(Text(name.replace("_", " ")), Text(str(value)))
    return table


def text_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = SCORED[-1:]
) -> Table:
    """Return a table of text rows. The first column is a name, the columns of `words` are text, which may wrap, and the
    others are numbers, which stay whole."""
    table = narrow_table(title)
    for number, column in enumerate(columns):
        whole = number > 0 and column not in words
        table.add_column(Text(column), justify="right" if whole else "left", no_wrap=whole, overflow="fold")
    for row in rows:
        table.add_row(at_dashes(row[0]), *map(Text, row[1:]))
    return table


def describe(path: Path) -> Table | Group:
    """Describe a scores file, a plan, a model or a run folder. Raises CheckpointError for anything else."""
    from ..convert import local_folder  # slow to import, which other commands need not wait for

    run = RunFolder(path)
    if run.summary.is_file():
        return _run(run)
    if path.suffix == ".safetensors":
        return _scores(Scores.load(path))
    if path.name == run.depth.name and path.is_file():
        return _depth(DepthScores.load(path))
    if path.suffix == ".json" and path.is_file():
        return _plan(path)
    for inside in (run.scores.name, run.plan.name):
        if (path / inside).is_file():
            return describe(path / inside)
    if run.records.is_dir() or run.status.is_file():
        return _state(run)
    if (config := local_folder(path) / "config.json").is_file():
        return pairs_table(f"model {path}", _config(config))
    raise CheckpointError(f"{path} is not a scores file, a plan, a model folder or a run folder. Give one of these.")


def _run(run: RunFolder) -> Group:
    """Describe an evaluated run: its models, search, cuts and costs; and its state, if it has more to do."""
    scores, plan, margins, totals = _cut(run)
    search = read_as(run.search_table, SearchTable) if run.search_table.is_file() else None
    tables = {
        "Search": (SEARCHED, searched_rows(search)),
        "Pruning": (KEPT, kept_rows(plan, scores, margins, totals)),
        "Predicted and measured": (PREDICTED, predicted_rows(run.path)),
    }
    shown = [text_table(title, columns, rows) for title, (columns, rows) in tables.items() if rows]
    status = read_status(run.status)
    unfinished = status is not None and not {*status["stages"].values()} <= {"done", "ran"}
    return Group(*([_state(run)] if unfinished else []), summary_table(read_summary(run.summary)), *shown)


def _state(run: RunFolder) -> Group:
    """Describe how far a run is."""
    return run_state(run.path, time.time()).shown(run.path)


def _scores(scores: Scores) -> Group:
    """Describe scores: their statistic, and each layer's sorted scores."""
    how = scores.statistic
    about = {"statistic": f"{how.sequence} over positions, {how.batch} over samples"}
    about |= {"neurons": f"{how.neurons}-activation", "heads": how.heads.replace("_", " ")}
    counts = {"samples": f"{scores.samples:,}", "tokens": f"{scores.tokens:,}", "model hash": scores.model_hash[:16]}
    curves = text_table("Scores, sorted", SCORED, score_rows(_plain(scores)))
    return Group(pairs_table("scores", about | counts), curves)


def _depth(depth: DepthScores) -> Table:
    """Describe depth scores: for each block length, the block whose removal hurts least."""
    best = min if depth.lower_is_better else max
    blocks = {}
    for length in depth.lengths:
        values = depth.of_length(length)
        first = best(values, key=values.__getitem__)
        blocks[f"without {length}"] = f"{numbers.loss(values[first])} (layers {first} to {first + length - 1})"
    greedy = {"one by one": ", ".join(str(layer) for layer, _ in depth.greedy)} if depth.greedy else {}
    about = {"metric": depth.metric, "all layers": numbers.loss(depth.baseline)}
    counts = {"samples": f"{depth.samples:,}", "tokens": f"{depth.tokens:,}", "model hash": depth.model_hash[:16]}
    return pairs_table("depth (layers count from 0)", about | counts | blocks | greedy)


def _plan(path: Path) -> Group:
    """Describe a plan: sizes and cuts, with shares of the score if its run folder has scores of the same shape."""
    plan, scores_file = Plan.load(path), RunFolder(path.absolute().parent.parent).scores
    scores = Scores.load(scores_file) if scores_file.is_file() else None
    known = _plain(scores) if scores and scores.shape == plan.shape else {}
    target = {axis: f"{plan.shape.axis_size(axis)} -> {plan.target.axis_size(axis)}" for axis in plan.keep}
    layers = {"layers": f"{plan.shape.layers} -> {plan.target.layers}"}
    cuts = text_table("Cuts", CUT, cut_rows(_kept(plan), known, plan.margins, _totals(plan)))
    return Group(pairs_table("plan", layers | target), cuts)


def _config(path: Path) -> dict[str, object]:
    keys: Sequence[str] = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    keys = (*keys, "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "torch_dtype")
    config = read_as(path, dict[str, object])
    return {key: _plain_word(config[key]) for key in keys if key in config}


def _plain_word(value: object) -> object:
    """Return a value of a config as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return numbers.count(value) if isinstance(value, int) else value
