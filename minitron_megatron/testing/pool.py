"""A warm pool of processes, gloo's on the CPU or NCCL's on GPUs: seconds to start once, then tenths of a second a job.

A job is a function that can be imported, called on every rank as `fn(topology, *args)` in a world of its own.
Messages travel as pickles over pipes between a process and its own children, never through files.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Self

import torch
import torch.distributed as dist

from ..parallel import Topology, claim_device, install_cpu_backend

__all__ = ["Pool"]

HOST = "127.0.0.1"
"""Where the ranks of a job meet."""

START_SECONDS = 900.0
"""How long a cold import of torch and megatron may take on a busy machine."""

GRACE_SECONDS = 5.0
"""How long the other ranks may take to follow a failed one before the pool is ended."""


class Pool:
    """Up to any number of worker processes, started when a job first needs them and kept for the next one.

        with Pool() as pool:
            losses = pool.run(train_two_steps, seed, tp=2, dp=2)  # one result a rank, in rank order

    A job that hangs, or a worker that dies, ends all workers; the next job starts new ones.
    """

    def __init__(self, timeout: float = 600.0, *, gpus: bool = False) -> None:
        """`timeout`: seconds that a job may take, unless its own `run` says otherwise. gpus: a worker has one of its
        own; otherwise it sees none, whatever the machine has."""
        self.timeout, self.gpus = timeout, gpus
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        tp: int = 1,
        pp: int = 1,
        vp: int = 1,
        ep: int = 1,
        dp: int = 1,
        sequence_parallel: bool = False,
        cp: int = 1,
        timeout: float | None = None,
    ) -> list[Any]:
        """Runs `fn(topology, *args)` on `tp * pp * dp` ranks, of which `cp` of `dp` share sequences; gives their
        results in rank order.

        Raises the first error that a rank met, with the rank's traceback as its cause; TimeoutError after `timeout`
        seconds; ChildProcessError where a worker died.
        """
        seconds = self.timeout if timeout is None else timeout
        workers = self._ready(tp * pp * dp)
        meeting = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        for rank, worker in enumerate(workers):
            place = _Place(rank, len(workers), meeting.port, seconds)
            worker.send((place, Topology(tp, pp, vp, ep, sequence_parallel, cp), fn, args))
        try:
            return self._collect(workers, seconds, getattr(fn, "__name__", str(fn)))
        except BaseException:
            if any(worker.busy for worker in workers):
                self.close()
            raise

    def close(self) -> None:
        """Ends every worker, and what it started, at once."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _ready(self, world: int) -> list[_Worker]:
        """The first `world` workers, started and warm."""
        if any(not worker.process.is_alive() for worker in self._workers):
            self.close()
        new = [_Worker(self.gpus) for _ in range(len(self._workers), world)]
        self._workers += new
        self._collect(new, START_SECONDS, "a worker's start")
        return self._workers[:world]

    def _collect(self, workers: Sequence[_Worker], seconds: float, what: str) -> list[Any]:
        """One answer from every worker, or the first error; after it the others have `GRACE_SECONDS` to follow."""
        end = time.monotonic() + seconds
        results: dict[int, Any] = {}
        failure: BaseException | None = None
        while waiting := [worker for worker in workers if worker.busy]:
            heard = wait([worker.pipe for worker in waiting], max(0.0, end - time.monotonic()))
            if not heard:
                ranks = [rank for rank, worker in enumerate(workers) if worker.busy]
                raise failure or TimeoutError(f"{what}: ranks {ranks} of {len(workers)} gave nothing in {seconds:g} s")
            for rank, worker in enumerate(workers):
                if worker.pipe in heard:
                    answer = worker.receive()
                    results[rank] = answer.value
                    if answer.error and not failure:
                        failure, end = answer.error, min(end, time.monotonic() + GRACE_SECONDS)
        if failure:
            raise failure
        return [results[rank] for rank in range(len(workers))]


@dataclass(frozen=True)
class _Place:
    """Where a job's ranks meet."""

    rank: int
    world: int
    port: int
    seconds: float


@dataclass(frozen=True)
class _Answer:
    value: Any = None
    error: BaseException | None = None


class _WorkerError(Exception):
    """A rank's own traceback, as the cause of the error that it raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Worker:
    """A process, the pipe to it, and whether an answer is due."""

    def __init__(self, gpus: bool) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # not a daemon: a job may start processes of its own, as mcore's asynchronous checkpoint writer does
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=False)
        with _visible(gpus):
            self.process.start()
        theirs.close()
        self.busy = True

    def send(self, job: tuple[Any, ...]) -> None:
        self.pipe.send_bytes(pickle.dumps(job))
        self.busy = True

    def receive(self) -> _Answer:
        try:
            value, error, trace = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.join(GRACE_SECONDS)
            return _Answer(error=ChildProcessError(f"a worker died with exit code {self.process.exitcode}"))
        finally:
            self.busy = False
        if error is not None:
            error.__cause__ = _WorkerError(trace)
        return _Answer(value, error)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()  # where it had not yet come to lead its own group
        self.process.join()
        self.pipe.close()


@contextmanager
def _visible(gpus: bool) -> Iterator[None]:
    """Within it, a process that starts sees this machine's GPUs or none."""
    before = dict(os.environ)
    try:
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection) -> None:
    """A worker's life: warm up, then one job after another until the parent is gone."""
    os.setsid()  # so that `kill` reaches what a job started, and Ctrl-C only the parent
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    install_cpu_backend()
    import megatron.core.models.gpt  # the slow part
    import megatron.core.optimizer  # noqa: F401

    answer = _packed(None)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send_bytes(answer)
            gc.collect()
            gc.freeze()  # each job ends with a collection, which need not look at what was imported so far
            answer = _answer(pipe.recv_bytes())


def _answer(message: bytes) -> bytes:
    """Does one job; gives its packed result or error."""
    try:
        place, layout, fn, args = pickle.loads(message)
        faulthandler.dump_traceback_later(place.seconds)
        return _packed(_in_own_world(place, layout, fn, args))
    except BaseException as error:  # a test's pytest.skip and SystemExit as well
        return _packed_error(error, traceback.format_exc())
    finally:
        faulthandler.cancel_dump_traceback_later()


def _in_own_world(place: _Place, layout: Topology, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Joins the job's processes, lays them out, runs, and leaves nothing of it behind."""
    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.rank), WORLD_SIZE=str(place.world))
    store = dist.TCPStore(HOST, place.port, timeout=timedelta(seconds=place.seconds))
    dist.init_process_group(
        claim_device(), store=store, rank=place.rank, world_size=place.world, timeout=timedelta(seconds=place.seconds)
    )
    try:
        topology = Topology.start(*astuple(layout))
        try:
            return fn(topology, *args)
        finally:
            topology.stop()
            _forget()
    finally:
        dist.destroy_process_group()


def _forget() -> None:
    """Resets what mcore keeps outside `parallel_state`, and lets go of models that would keep a job's groups, and a
    hundred threads with them, alive: through DDP's autograd nodes and through the rotary embedding's cache."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    RotaryEmbedding.forward.cache_clear()
    for wrapped in [each for each in gc.get_objects() if type(each) is DistributedDataParallel]:
        wrapped.grad_accs.clear()
        wrapped.config.grad_scale_func = wrapped.config.finalize_model_grads_func = None
    gc.collect()


def _packed(value: Any) -> bytes:
    return pickle.dumps((value, None, ""))


def _packed_error(error: BaseException, trace: str) -> bytes:
    """The error itself where it survives pickling, else its words."""
    try:
        packed = pickle.dumps((None, error, trace))
        pickle.loads(packed)
    except Exception:
        packed = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return packed
