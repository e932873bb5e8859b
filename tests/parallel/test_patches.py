"""Each process-wide patch of torch and mcore is still needed: without it, mcore shows the fault that it is for."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.parallel import Topology, load_optimizer
from minitron_megatron.parallel.mcore_patches import mend_writer, writes_collected
from minitron_megatron.parallel.patch import unpatched
from minitron_megatron.testing import Pool
from tests.parallel.test_backend import state_of, train_and_save, trainee

AT_0_19 = version("megatron-core").startswith("0.19")


def works(action: Callable[[], Any]) -> bool:
    try:
        action()
    except (AssertionError, NameError, RuntimeError, pytest.fail.Exception):  # torch: AssertionError without CUDA
        return False
    return True


def with_and_without(action: Callable[[], Any], without: AbstractContextManager[Any]) -> tuple[bool, bool]:
    """Return whether something works with a patch, and without it."""
    first = works(action)
    with without:
        return first, works(action)


# ---- torch


def device_arguments(topology: Topology) -> tuple[bool, bool]:
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler

    return with_and_without(lambda: ConstantGradScaler(1.0), unpatched(torch, "tensor"))


def moves_to_cuda(topology: Topology) -> tuple[bool, bool]:
    from megatron.core.tensor_parallel.data import broadcast_data

    def broadcast() -> Any:
        return broadcast_data(["tokens"], {"tokens": torch.arange(4)}, torch.int64)

    return with_and_without(broadcast, unpatched(Tensor, "cuda"))


def type_names(topology: Topology) -> tuple[bool, bool]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    weight = torch.zeros(1, dtype=torch.bfloat16)

    def check() -> None:
        assert f"'{weight.type()}'" in inspect.getsource(DistributedOptimizer)

    return with_and_without(check, unpatched(Tensor, "type"))


def current_device(topology: Topology) -> tuple[bool, bool]:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    return with_and_without(lambda: RotaryEmbedding(8, 1.0), unpatched(torch.cuda, "current_device"))


def synchronize(topology: Topology) -> tuple[bool, bool]:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller

    def schedule() -> None:
        caller = TemporalAsyncCaller()
        caller.schedule_async_call(AsyncRequest(int, (), []))
        caller.process.join()

    return with_and_without(schedule, unpatched(torch.cuda, "synchronize"))


@pytest.mark.parametrize("job", [device_arguments, moves_to_cuda, type_names, current_device, synchronize])
def test_mcore_fails_on_a_cpu_without_the_patch_of_torch(pool: Pool, job: Callable[..., Any]) -> None:
    assert pool.run(job) == [(True, False)]


def under_a_device(topology: Topology) -> list[str]:
    with torch.device("meta"):
        return [str(made.device) for made in (torch.empty(1), torch.tensor(1.0), torch.empty(1, device="cuda"))]


def test_a_device_of_a_block_still_counts(pool: Pool) -> None:
    """transformers and our own builds make modules under `with torch.device("meta")`."""
    assert pool.run(under_a_device) == [["meta", "meta", "cpu"]]


def stream_of_gradients(topology: Topology) -> bool:
    from megatron.core.distributed import param_and_grad_buffer

    return "torch.cuda.current_stream()" in inspect.getsource(param_and_grad_buffer)


@pytest.mark.skipif(not AT_0_19, reason="mcore 0.16 asks for a stream only where experts' communication overlaps")
def test_mcore_0_19_asks_for_a_stream_of_gradients(pool: Pool) -> None:
    assert pool.run(stream_of_gradients) == [True]


COMPILER = """
import sys, torch
from minitron_megatron.parallel.torch_patches import patch_torch, uncompiled
patch_torch()
calls = []
with uncompiled():
    compile = torch.compile
    torch.compile = lambda *args, **options: calls.append(args) or compile(*args, **options)
    from megatron.core.tensor_parallel import random
assert calls, "mcore compiles nothing when it is imported"
assert "torch._dynamo" not in sys.modules, "the compiler is imported"
torch.compile(lambda: 0)
assert "torch._dynamo" in sys.modules, "torch.compile no longer imports the compiler"
"""


def test_importing_mcore_would_import_torchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- mcore on a CPU


def draws(seed: int) -> tuple[Tensor, Tensor]:
    """Return numbers drawn in mcore's own random state, seeded with `seed`, and numbers drawn after it."""
    from megatron.core.tensor_parallel import random

    torch.manual_seed(0)
    tracker = random.CudaRNGStatesTracker()
    tracker.add("state", seed)
    with tracker.fork("state"):
        inside = torch.rand(4)
    return inside, torch.rand(4)


def random_states(topology: Topology) -> list[bool]:
    """Return whether the random states of two seeds differ, and leave torch's alone: with all patches, and without."""
    from megatron.core.tensor_parallel import random

    def separate() -> None:
        (inside, after), (other, later) = draws(1), draws(2)
        assert not torch.equal(inside, other) and torch.equal(after, later)

    patches = [(torch.cuda, "manual_seed"), (torch.cuda, "get_rng_state")]
    patches += [(random, "_get_cuda_rng_state"), (random, "_set_cuda_rng_state")]
    return [each for patch in patches for each in with_and_without(separate, unpatched(*patch))]


def test_random_states_need_each_of_their_patches(pool: Pool) -> None:
    assert pool.run(random_states) == [[True, False] * 4]


def groups(topology: Topology) -> tuple[bool, bool]:
    from megatron.core import parallel_state

    def shared() -> None:
        assert parallel_state.create_group([0]) is parallel_state.create_group([0])

    return with_and_without(shared, unpatched(parallel_state, "create_group"))


def test_mcore_makes_a_group_for_every_purpose_without_the_patch(pool: Pool) -> None:
    assert pool.run(groups) == [(True, False)]


def gate(topology: Topology) -> tuple[bool, bool]:
    from megatron.core.transformer.moe import moe_utils

    inputs = torch.ones(2, 1, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True), None, torch.float32
    return with_and_without(
        lambda: moe_utils.router_gating_linear(*inputs).sum().backward(), unpatched(moe_utils, "te_general_gemm")
    )


@pytest.mark.skipif(AT_0_19, reason="mcore 0.19 defines te_general_gemm itself")
def test_the_router_names_a_function_that_is_missing_without_transformer_engine(pool: Pool) -> None:
    assert pool.run(gate) == [(True, False)]


WHERE_CUDA_IS = """
import torch
from minitron_megatron.errors import MinitronError
from minitron_megatron.parallel import Topology
torch.cuda.is_available = lambda: True
try:
    Topology.start()  # without a real GPU it cannot join
except (AssertionError, MinitronError, RuntimeError):
    pass
from megatron.core.transformer.moe import moe_utils
inputs = torch.ones(2, 1, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True), None, torch.float32
moe_utils.router_gating_linear(*inputs).sum().backward()
"""


def test_the_router_works_without_transformer_engine_where_cuda_is_too() -> None:
    done = subprocess.run([sys.executable, "-c", WHERE_CUDA_IS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- mcore's checkpoints


def load_unmended(topology: Topology, folder: str) -> str:
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    chunks, optimizer = trainee(topology, torch.float32, blank=True)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part._init_optimizer_states_with_dummy_values()
    loaded = dist_checkpointing.load(state_of(chunks, optimizer, is_loading=True), folder)
    with unpatched(DistributedOptimizer, "_set_main_param_and_optimizer_states"):
        try:
            load_optimizer(optimizer, loaded["optimizer"])
        except KeyError as error:
            return str(error.args[0])
    return ""


def test_the_distributed_optimizer_misses_a_step_that_was_not_saved(pool: Pool, tmp_path: Path) -> None:
    pool.run(train_and_save, str(tmp_path), torch.float32, False, dp=2)
    assert pool.run(load_unmended, str(tmp_path), dp=2) == ["step", "step"]


def results_queue(topology: Topology) -> tuple[str, str]:
    """Return the type of queue with which mcore collects its writers' results: with the patch, and without."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue_of = getattr(filesystem_async, "get_write_results_queue" if AT_0_19 else "_get_write_results_queue")
    with writes_collected():
        first = type(queue_of()).__module__
    source = inspect.getsource(queue_of)
    return first, "a manager's" if "Manager()" in source else ""


def test_mcore_starts_a_manager_process_for_its_writers(pool: Pool) -> None:
    assert pool.run(results_queue) == [("minitron_megatron.parallel.mcore_patches", "a manager's")]


def silent_writer(topology: Topology, folder: str) -> tuple[bool, bool]:
    """Return whether the writer raises the error of a missing folder: with the patch, and without."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write() -> None:
        bucket = (f"{folder}/missing/file", "key", ([], []))
        queues = {"results_queue": None, "count_queue": None}
        FileSystemWriterAsync.write_preloaded_data([], local_proc_idx=0, write_bucket=bucket, use_fsync=False, **queues)

    def fails() -> None:
        with pytest.raises(FileNotFoundError):
            write()

    mend_writer()
    return with_and_without(fails, unpatched(FileSystemWriterAsync, "write_preloaded_data"))


@pytest.mark.skipif(not AT_0_19, reason="mcore 0.16 writes with its own strategy, which raises the error")
def test_mcore_0_19_keeps_its_writers_error_to_itself(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(silent_writer, str(tmp_path)) == [(True, False)]
