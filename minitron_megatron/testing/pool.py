"""Warm pool of processes with gloo on the CPU or NCCL on GPUs: seconds to start once, then tenths of a second per job.

A job is an importable function, called on every rank as `fn(topology, *args)` in a world of its own. Messages are
pickles sent over pipes between a process and its own children, never through files.

Workers without a GPU are forked by multiprocessing's fork server. What `multiprocessing.set_forkserver_preload` names
is imported there once, and not by each worker.
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
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from ..parallel import Parallel, Topology, claim_device, install_cpu_backend

__all__ = ["Pool"]

T = TypeVar("T")

HOST = "127.0.0.1"
"""Address of the store at which the ranks of a job rendezvous."""

START_SECONDS = 900.0
"""Time limit of a worker's start: a cold import of torch and megatron on a busy machine."""

GRACE_SECONDS = 5.0
"""Time for the other ranks to fail or finish after the first error, before the pool is ended."""


class Pool:
    """Pool of any number of worker processes, started when a job first needs them and kept for the next job.

        with Pool() as pool:
            losses = pool.run(train_two_steps, seed, tp=2, dp=2)  # one result a rank, in rank order

    A job that hangs, or a worker that dies, ends all workers; the next job starts new ones.
    """

    def __init__(self, timeout: float = 600.0, *, gpus: bool = False) -> None:
        """timeout: default time limit of a job in seconds. gpus: each worker gets its own GPU; otherwise workers see no
        GPU, even if the machine has some."""
        self.timeout, self.gpus = timeout, gpus
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(
        self,
        fn: Callable[..., T],
        *args: object,
        tp: int = 1,
        pp: int = 1,
        vp: int = 1,
        ep: int = 1,
        dp: int = 1,
        sequence_parallel: bool = False,
        cp: int = 1,
        timeout: float | None = None,
    ) -> list[T]:
        """Run `fn(topology, *args)` on `tp * pp * dp` ranks and return their results in rank order.

        Raises the error that a rank met first, with the rank's traceback as its cause; TimeoutError after `timeout`
        seconds; ChildProcessError where a worker died.
        """
        seconds = self.timeout if timeout is None else timeout
        workers = self._ready(tp * pp * dp)
        meeting = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        for rank, worker in enumerate(workers):
            place = _Place(rank, len(workers), meeting.port, seconds)
            worker.send((place, Parallel(tp, pp, vp, ep, sequence_parallel, cp), fn, args))
        try:
            return self._collect(workers, seconds, getattr(fn, "__name__", str(fn)))
        except BaseException:
            if any(worker.busy for worker in workers):
                self.close()
            raise

    def close(self) -> None:
        """Kill every worker and the processes that it started."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _ready(self, world: int) -> list[_Worker]:
        """Return the first `world` workers, started and warm."""
        if any(not worker.process.is_alive() for worker in self._workers):
            self.close()
        new = [_Worker(self.gpus) for _ in range(len(self._workers), world)]
        self._workers += new
        self._collect(new, START_SECONDS, "a worker's start")
        return self._workers[:world]

    def _collect(self, workers: Sequence[_Worker], seconds: float, what: str) -> list[Any]:
        """Return every worker's answer, or raise the first error, after at most `GRACE_SECONDS` for the others."""
        end = time.monotonic() + seconds
        results: dict[int, Any] = {}
        failures: list[tuple[float, BaseException]] = []
        while waiting := [worker for worker in workers if worker.busy]:
            ready = wait([worker.pipe for worker in waiting], max(0.0, end - time.monotonic()))
            if not ready:
                ranks = [rank for rank, worker in enumerate(workers) if worker.busy]
                raise _first(failures) or TimeoutError(
                    f"{what}: ranks {ranks} of {len(workers)} did not answer within {seconds:g} s"
                )
            for rank, worker in enumerate(workers):
                if worker.pipe in ready:
                    answer = worker.receive()
                    results[rank] = answer.value
                    if answer.error:
                        failures.append((answer.raised_at, answer.error))
                        end = min(end, time.monotonic() + GRACE_SECONDS)
        if failure := _first(failures):
            raise failure
        return [results[rank] for rank in range(len(workers))]


@dataclass(frozen=True)
class _Place:
    """Rank in a job, and the port at which its ranks rendezvous."""

    rank: int
    world: int
    port: int
    seconds: float


@dataclass(frozen=True)
class _Answer:
    """Result of a rank's job, or its error and the time at which it was raised, in seconds of the machine's clock."""

    value: Any = None
    error: BaseException | None = None
    raised_at: float = 0.0


def _first(failures: Sequence[tuple[float, BaseException]]) -> BaseException | None:
    """Return the error that was raised first: those of other ranks, such as closed connections, follow from it."""
    return min(failures, key=lambda failure: failure[0])[1] if failures else None


class _WorkerError(Exception):
    """Traceback of a rank, as the cause of the error that it raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Worker:
    """Worker process, the pipe to it, and whether an answer is pending."""

    def __init__(self, gpus: bool) -> None:
        # a process that has asked for GPUs cannot be forked
        context: Any = get_context("spawn" if gpus else "forkserver")
        self.pipe, worker_pipe = context.Pipe()
        # not a daemon: a job may start processes of its own, as mcore's asynchronous checkpoint writer does
        self.process: BaseProcess = context.Process(target=_serve, args=(worker_pipe,), daemon=False)
        with _visible(gpus):
            self.process.start()
        worker_pipe.close()
        self.busy = True

    def send(self, job: tuple[object, ...]) -> None:
        self.pipe.send_bytes(pickle.dumps(job))
        self.busy = True

    def receive(self) -> _Answer:
        try:
            value, error, trace, raised_at = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.join(GRACE_SECONDS)
            return _Answer(error=ChildProcessError(f"a worker died with exit code {self.process.exitcode}"))
        finally:
            self.busy = False
        if error is not None:
            error.__cause__ = _WorkerError(trace)
        return _Answer(value, error, raised_at)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()  # in case it did not lead its own process group yet
        self.process.join()
        self.pipe.close()


@contextmanager
def _visible(gpus: bool) -> Iterator[None]:
    """Make processes that start inside the block see this machine's GPUs, or none."""
    before = dict(os.environ)
    try:
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection) -> None:
    """Run a worker: warm up, then do jobs until the parent ends."""
    os.setsid()  # so that `kill` reaches processes that a job started, and Ctrl-C only reaches the parent
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
            gc.freeze()  # the garbage collection after each job then skips all imported modules
            answer = _answer(pipe.recv_bytes())


def _answer(message: bytes) -> bytes:
    """Do one job and return its pickled result or error."""
    try:
        place, layout, fn, args = pickle.loads(message)
        faulthandler.dump_traceback_later(place.seconds)
        return _in_own_world(place, layout, fn, args)
    except BaseException as error:  # including pytest.skip and SystemExit
        return _packed_error(error, traceback.format_exc())
    finally:
        faulthandler.cancel_dump_traceback_later()


def _in_own_world(place: _Place, layout: Parallel, fn: Callable[..., object], args: tuple[object, ...]) -> bytes:
    """Join the job's process group, set up its layout, run the job, clean up, and return the pickled answer."""
    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.rank), WORLD_SIZE=str(place.world))
    store = dist.TCPStore(HOST, place.port, timeout=timedelta(seconds=place.seconds))
    dist.init_process_group(
        claim_device(), store=store, rank=place.rank, world_size=place.world, timeout=timedelta(seconds=place.seconds)
    )
    try:
        topology = Topology.start(layout)
        try:
            return _packed(fn(topology, *args))
        except BaseException as error:  # timed before the cleaning up, which waits for other ranks
            return _packed_error(error, traceback.format_exc())
        finally:
            topology.stop()
            _forget()
    finally:
        dist.destroy_process_group()


def _forget() -> None:
    """Reset mcore's global state outside of `parallel_state`, and release the job's models.

    DDP's autograd nodes and the rotary embedding's cache would keep them alive, and with them the job's process groups
    and about a hundred threads.
    """
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


def _packed(value: object) -> bytes:
    return pickle.dumps((value, None, "", 0.0))


def _packed_error(error: BaseException, trace: str) -> bytes:
    """Pickle an error, or a RuntimeError with its message where it cannot be pickled."""
    now = time.monotonic()
    try:
        packed = pickle.dumps((None, error, trace, now))
        pickle.loads(packed)
    except Exception:
        packed = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), trace, now))
    return packed
