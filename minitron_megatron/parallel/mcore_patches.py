"""All process-wide patches of megatron-core, for the versions in `mcore_compat.FITS`.

Each names the line of mcore that needs it; `tests/parallel/test_patches.py` shows what fails without it.
"""

from __future__ import annotations

import pickle
import queue
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .collectives import device_backend
from .kernels import one_kernel, rotated
from .limits import WAIT
from .patch import patch, patched

if TYPE_CHECKING:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

__all__ = [
    "mend_distributed_optimizer",
    "mend_writer",
    "patch_mcore",
    "patch_mcore_for_cpu",
    "release_groups",
    "writes_collected",
]


# ---- on the CPU


def patch_mcore_for_cpu() -> None:
    """Install the patches without which mcore needs CUDA."""
    from megatron.core.tensor_parallel import random as mcore_random

    # tensor_parallel/random.py:41 and 72
    patch(mcore_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    patch(mcore_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))


# ---- on every device


def patch_mcore() -> None:
    """Install the patches without which mcore makes many process groups, fails without Transformer Engine, and rotates
    queries and keys on a GPU in many kernels."""
    from megatron.core.transformer.moe import moe_utils

    _spare_groups()
    if not hasattr(moe_utils, "te_general_gemm"):  # moe/moe_utils.py uses it, but defines it only where TE is installed
        patch(moe_utils, "te_general_gemm", None)
    _fuse_rotary()


_groups: dict[tuple[int, ...], object] = {}
"""Ranks -> their process group; the empty tuple stands for the world, whose end makes the others invalid."""


def release_groups() -> None:
    """Drop the process groups of a layout that has ended."""
    _groups.clear()


def _spare_groups() -> None:
    """Make mcore create groups for the device's tensors alone, and one gloo group for each distinct set of ranks.

    A layout has some twenty groups. By default each has the backends of the world, on a GPU NCCL and gloo: a socket to
    every other rank, and more than a thousand open files at 256 ranks. Ours exchange tensors of the device only; for
    optimizer states in host memory mcore asks for a gloo group by name.

    In a small world most groups have the same ranks. A gloo group holds three threads, one of which wakes a hundred
    times a second, and takes a rendezvous of the world to create. Every rank issues the operations of a set of ranks in
    the same order, so that one gloo group serves all purposes.
    """
    from megatron.core import parallel_state

    create = parallel_state.create_group

    def create_group(
        ranks: Sequence[int] | None = None, timeout: object = None, backend: str | None = None, **kwargs: object
    ) -> object:
        backend = backend or device_backend()  # parallel_state.py:214
        if backend != "gloo":
            return create(ranks, timeout or WAIT, backend, **kwargs)
        world = torch.distributed.group.WORLD
        if _groups.get(()) is not world:  # a script of the user's may end its world without Topology.stop
            _groups.clear()
            _groups[()] = world
        key = tuple(sorted(ranks or range(torch.distributed.get_world_size())))  # torch sorts them too
        if key not in _groups:
            _groups[key] = create(ranks, timeout or WAIT, backend, **kwargs)
        return _groups[key]

    patch(parallel_state, "create_group", create_group)


def _fuse_rotary() -> None:
    """Make rotary embeddings on a GPU one kernel each way.

    mcore's plain function is six (models/common/embeddings/rope_utils.py, `_apply_rotary_pos_emb_bshd`). Transformer
    Engine's, to which mcore has a switch, takes no positions that differ between samples.
    """
    from megatron.core.models.common.embeddings import rope_utils

    plain = rope_utils._apply_rotary_pos_emb_bshd
    fused = one_kernel(plain)

    def rotate(t: Tensor, freqs: Tensor, *args: object, **options: object) -> Tensor:
        if args or options.get("rotary_interleaved") or options.get("multi_latent_attention"):
            return plain(t, freqs, *args, **options)
        return rotated(fused, t, freqs, **options)

    patch(rope_utils, "_apply_rotary_pos_emb_bshd", rotate)


# ---- checkpoints


def mend_distributed_optimizer() -> None:
    """Fix checkpoint loading of mcore 0.16's DistributedOptimizer with torch's Adam (without TE or apex).

    Loading raises KeyError("step"), since only `param` and the moments are saved (optimizer/distrib_optimizer.py,
    `_set_main_param_and_optimizer_states`).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def copy_states(self: DistributedOptimizer, model_param: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for name, state in {"param": main, **self.optimizer.state[main]}.items():
            if name in tensors:
                state.copy_(tensors[name])

    patch(DistributedOptimizer, "_set_main_param_and_optimizer_states", copy_states)


class _Results:
    """Results queue from the checkpoint writer processes to the training process, backed by an anonymous file."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the request that holds it)

    def put(self, results: object) -> None:
        pickle.dump(results, self.file)
        self.file.flush()

    def get_nowait(self) -> object:
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except EOFError:
            raise queue.Empty from None


@contextmanager
def writes_collected() -> Iterator[None]:
    """Make mcore's next checkpoint collect its writers' results in a file of this process, inside the block.

    Otherwise mcore spawns a manager process for them (dist_checkpointing/strategies/filesystem_async.py,
    `_results_queue`), which takes seconds to start and outlives a killed run.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with patched(filesystem_async, "_results_queue", _Results()):
        yield


def mend_writer() -> None:
    """Make mcore 0.19's checkpoint writer raise the error that stopped it.

    mcore returns the exception and later asserts that there is none (dist_checkpointing/strategies/filesystem_async.py,
    `check_local_output`), so that only its type would be reported.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = FileSystemWriterAsync.write_preloaded_data

    def write(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        if kwargs["results_queue"] is None and isinstance(result[1], Exception):
            raise result[1]
        return result

    patch(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write))
