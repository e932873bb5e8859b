"""Time per question of lm-evaluation-harness, compared with the harness's own Hugging Face model on the same cores.

    python benchmarks/tasks_cost.py MODEL FILES TASK [TASK ...]

MODEL: a Hugging Face folder. FILES: a folder with `<task>/<split>.jsonl`, as for `evaluate.task_files`. Both answer the
same questions in turn, in batches of eight; medians. Both times include common work (reading data, making prompts).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from clock import seconds
from record import record

from minitron_megatron.convert import load_hf
from minitron_megatron.data import transformers_tokenizer
from minitron_megatron.evaluate import Task, run_tasks
from minitron_megatron.evaluate.tasks import _configured, _manager, _quiet
from minitron_megatron.parallel import Topology

REPEATS, BATCH = 3, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", type=Path)
    parser.add_argument("tasks", nargs="+")
    args = parser.parse_args()
    topology = Topology.start()
    model, tokenizer = load_hf(args.model, topology), transformers_tokenizer(args.model)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        harness = HFLM(pretrained=str(args.model), device=str(topology.device), dtype="float32", batch_size=BATCH)
    found: dict[str, Any] = {}
    for name in args.tasks:
        task = Task(name)

        def ours(task: Task = task) -> None:
            run_tasks(model, [task], tokenizer, topology, files=args.files, truncate=True, micro_batch=BATCH)

        def theirs(task: Task = task) -> None:
            with _quiet():
                configured = [_configured(task, task.name, args.files)]
                simple_evaluate(harness, tasks=configured, task_manager=_manager(), bootstrap_iters=0)

        ours()
        times = [(seconds(ours), seconds(theirs)) for _ in range(REPEATS)]
        pairs = [(mine[0], other[0]) for mine, other in times]
        found[name] = {
            "wall_ratio": median(mine / other for mine, other in pairs),
            "cpu_ratio": median(mine[1] / other[1] for mine, other in times),
            "spread": [min(mine / other for mine, other in pairs), max(mine / other for mine, other in pairs)],
        }
    record("tasks_cost", model=args.model.name, threads=torch.get_num_threads(), over_hugging_face=found)


if __name__ == "__main__":
    main()
