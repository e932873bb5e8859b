"""The pool returns every rank's result, raises their errors, and survives hangs and deaths of workers."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
import torch

from minitron_megatron.errors import PlanError, TopologyError
from minitron_megatron.parallel import Topology, all_reduce, barrier
from minitron_megatron.testing import Pool


def place(topology: Topology, offset: int) -> tuple[int, int, int, int, float]:
    total = all_reduce(torch.tensor(float(topology.rank + offset)), topology.model_group)
    return topology.tp_rank, topology.pp_rank, topology.dp_rank, os.getpid(), total.item()


def gpus_seen(topology: Topology) -> int:
    return torch.cuda.device_count()


def test_workers_see_no_gpu_unless_they_are_asked_to(pool: Pool) -> None:
    assert pool.run(gpus_seen, dp=2) == [0, 0]


def fail_on_one_rank(topology: Topology, rank: int) -> None:
    if topology.rank == rank:
        raise PlanError(f"rank {rank} met something.")
    barrier()


def unpicklable_error(topology: Topology) -> None:
    class LocalError(Exception):
        pass

    raise LocalError("only here")


def sleep_with_child(topology: Topology, note: str) -> None:
    child = subprocess.Popen(["sleep", "300"])
    with open(note, "w") as file:
        file.write(str(child.pid))
    time.sleep(300)


def die(topology: Topology) -> None:
    if topology.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier()


def test_ranks_are_laid_out_and_workers_stay(pool: Pool) -> None:
    tensor_parallel = pool.run(place, 10, tp=2)
    pipeline_parallel = pool.run(place, 10, pp=2)
    data_parallel = pool.run(place, 10, dp=2)
    alone = pool.run(place, 10)
    assert [r[:3] for r in tensor_parallel] == [(0, 0, 0), (1, 0, 0)]
    assert [r[:3] for r in pipeline_parallel] == [(0, 0, 0), (0, 1, 0)]
    assert [r[:3] for r in data_parallel] == [(0, 0, 0), (0, 0, 1)]
    assert [r[4] for r in tensor_parallel] == [21.0, 21.0]
    assert [r[4] for r in data_parallel] == [10.0, 11.0]
    assert {r[3] for r in tensor_parallel} == {r[3] for r in pipeline_parallel} == {r[3] for r in data_parallel}
    assert alone[0][3] == tensor_parallel[0][3]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_error_comes_home_with_its_traceback(pool: Pool, rank: int) -> None:
    with pytest.raises(PlanError, match=f"rank {rank} met something") as caught:
        pool.run(fail_on_one_rank, rank, tp=2)
    assert "in fail_on_one_rank" in str(caught.value.__cause__)
    assert pool.run(place, 0, tp=2)[1][4] == 1.0


def test_errors_that_cannot_travel_and_layouts_that_cannot_be(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="LocalError: only here"):
        pool.run(unpicklable_error)
    with pytest.raises(TopologyError, match="vp=2 needs pp"):
        pool.run(place, 0, vp=2)
    assert pool.run(place, 5)[0][4] == 5.0


def test_a_hang_ends_the_workers_and_what_they_started(tmp_path) -> None:
    with Pool() as own:
        before = own.run(place, 0)[0][3]
        note = tmp_path / "child"
        with pytest.raises(TimeoutError, match="sleep_with_child: ranks \\[0\\] of 1"):
            own.run(sleep_with_child, str(note), timeout=3.0)
        assert not is_running(before)
        assert not is_running(int(note.read_text()))


def is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_death_is_told_and_the_next_job_runs() -> None:
    with Pool() as own:
        with pytest.raises((ChildProcessError, RuntimeError)):
            own.run(die, dp=2)
        assert len(own.run(place, 0)) == 1
