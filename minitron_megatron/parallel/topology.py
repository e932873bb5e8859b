"""Parallel layout: sizes, this process's ranks and its process groups. Always passed as an argument, never global."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from types import ModuleType

import torch
import torch.distributed as dist

from .. import numbers
from ..errors import TopologyError
from ..settings import Count, Settings
from .backend import install_cpu_backend
from .collectives import device_backend
from .limits import JOIN, WAIT, allow_open_files
from .mcore_compat import quieten
from .mcore_patches import patch_mcore, release_groups

__all__ = ["Parallel", "PlannedTopology", "Topology", "claim_device", "launched"]


class Parallel(Settings):
    """Parallel layout. The remaining ranks are data-parallel. Results do not depend on the layout."""

    tp: Count = 1
    """Tensor-parallel size."""
    pp: Count = 1
    """Pipeline-parallel size (number of pipeline stages)."""
    vp: Count = 1
    """Virtual pipeline stages per rank; above 1 the schedule is interleaved."""
    ep: Count = 1
    """Expert-parallel size, taken from all ranks of a pipeline stage. Each rank holds whole experts; tp does not split
    an expert."""
    sequence_parallel: bool = False
    """Split the activations of the norms over the tensor-parallel ranks."""
    cp: Count = 1
    """Context-parallel size: this many ranks share each training sequence. For long sequences."""


class Topology(Parallel):
    """Sizes and ranks of tensor (tp), pipeline (pp), virtual pipeline (vp), data (dp), expert (ep) and context (cp)
    parallelism.

    Each `cp` neighbours of the `dp` data-parallel ranks share the sequences that they train on (`ContextShard`). mcore
    is not aware of this: it sums their gradients like those of any data-parallel ranks. Scoring and validation treat
    them as ordinary data-parallel ranks.

    The groups are mcore's own: `lay_out` creates them and `stop` destroys them.
    """

    @classmethod
    def of(cls, layout: Parallel) -> Topology:
        """Return the layout before its processes start: sizes without ranks."""
        return cls(**{name: getattr(layout, name) for name in Parallel.model_fields})

    @classmethod
    def start(cls, layout: Parallel | None = None, **sizes: int) -> Topology:
        """Join the processes that torchrun started (or only this one) and create the groups. Collective over the world.

        sizes: fields of the layout, such as `tp=2`, in place of a `Parallel`. Raises TopologyError where the number of
        processes does not fit the layout.
        """
        quieten()
        install_cpu_backend()
        patch_mcore()
        topology = cls.of((layout or Parallel()).replaced(**sizes))
        world = dist.get_world_size() if dist.is_initialized() else _launched_world()
        topology.check(world)
        allow_open_files(world)
        if not dist.is_initialized():
            _join()
        topology.lay_out()
        return topology

    def lay_out(self) -> None:
        """Create mcore's groups among the joined processes. Collective over the world."""
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(
            self.tp,
            self.pp,
            virtual_pipeline_model_parallel_size=self.vp if self.vp > 1 else None,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=1,  # an expert is small: each lies whole on one rank
            distributed_timeout_minutes=WAIT // timedelta(minutes=1),
        )
        model_parallel_cuda_manual_seed(1)
        if self.cp > 1:
            _ = self.cp_group  # created here, since creating it is collective
        if dist.get_backend() == "gloo":  # whose ranks connect one by one: one that ended now would fail the others
            dist.barrier()

    @classmethod
    def running(cls, sequence_parallel: bool = False) -> Topology:
        """Return the layout that a script has set up with mcore's parallel_state.

        Raises TopologyError for mcore's context parallelism, and for experts that are split by tensor parallelism.
        """
        state = _state()
        if state.get_context_parallel_world_size() > 1:
            raise TopologyError("mcore's context parallelism is not supported. Set context_parallel_size to 1.")
        if state.get_expert_model_parallel_world_size() > 1 and state.get_expert_tensor_parallel_world_size() > 1:
            raise TopologyError(
                "experts split by tensor parallelism are not supported. Set expert_tensor_parallel_size to 1."
            )
        return cls(
            state.get_tensor_model_parallel_world_size(),
            state.get_pipeline_model_parallel_world_size(),
            state.get_virtual_pipeline_model_parallel_world_size() or 1,
            state.get_expert_model_parallel_world_size(),
            sequence_parallel,
        )

    def stop(self) -> None:
        """Destroy the groups; the processes stay joined, so that another layout can follow."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        release_groups()
        for name in [name for name, known in vars(type(self)).items() if isinstance(known, cached_property)]:
            vars(self).pop(name, None)

    def check(self, world: int) -> None:
        """Raise TopologyError where this layout does not fit `world` processes."""
        if world % (self.tp * self.pp):
            raise TopologyError(
                f"tp={self.tp} x pp={self.pp} needs a multiple of {self.tp * self.pp} processes, not {world}. "
                f"Start {self.tp * self.pp} of them: launch/local.sh {self.tp * self.pp} run RECIPE."
            )
        needed = self.tp * self.pp * self.cp
        if world % needed:
            raise TopologyError(
                f"tp={self.tp} x pp={self.pp} x cp={self.cp} needs a multiple of {needed} processes, not {world}. "
                f"Start {needed} of them: launch/local.sh {needed} run RECIPE."
            )
        if world // self.pp % self.ep:
            raise TopologyError(
                f"ep={self.ep} needs a multiple of {self.ep} processes in each pipeline stage, not {world // self.pp}. "
                f"Start {math.lcm(self.ep, self.tp) * self.pp} of them, or set ep to a divisor of {world // self.pp}."
            )
        if self.vp > 1 and self.pp == 1:
            raise TopologyError(f"vp={self.vp} needs pp of 2 or more. Set vp to 1.")
        if self.sequence_parallel and self.tp == 1:
            raise TopologyError("`sequence_parallel` has no effect at tp=1. Set it to false.")

    @property
    def world(self) -> int:
        return dist.get_world_size()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def replicas(self) -> int:
        """Number of micro-batches in training at the same time: one per `cp` data-parallel ranks."""
        return self.dp // self.cp

    @property
    def replica(self) -> int:
        """Index of the replica that this rank belongs to."""
        return self.dp_rank // self.cp

    @property
    def sequence_unit(self) -> int:
        """Number that the length of a training sequence must be a multiple of.

        Context-parallel ranks hold two chunks each; with sequence parallelism, tensor-parallel ranks split these
        evenly.
        """
        tp = self.tp if self.sequence_parallel else 1
        return tp if self.cp == 1 else self.cp * math.lcm(2, tp)

    @cached_property
    def device(self) -> torch.device:
        """Device of this rank's tensors."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @cached_property
    def tp_group(self) -> dist.ProcessGroup:
        return _state().get_tensor_model_parallel_group()

    @cached_property
    def pp_group(self) -> dist.ProcessGroup:
        return _state().get_pipeline_model_parallel_group()

    @cached_property
    def dp_group(self) -> dist.ProcessGroup:
        return _state().get_data_parallel_group()

    @cached_property
    def model_group(self) -> dist.ProcessGroup:
        """Group of the tp x pp ranks that together hold one copy of the model."""
        return _state().get_model_parallel_group()

    @cached_property
    def ep_group(self) -> dist.ProcessGroup:
        """Group of the ranks that together hold all experts."""
        return _state().get_expert_model_parallel_group()

    @cached_property
    def edp_group(self) -> dist.ProcessGroup:
        """Group of the ranks that hold the same experts."""
        return _state().get_expert_data_parallel_group()

    @cached_property
    def cp_group(self) -> dist.ProcessGroup:
        """Group of the ranks that share sequences. The first access, in `lay_out`, is collective over the world."""
        firsts = range(0, self.dp, self.cp)
        places = [(pp, tp, first) for pp in range(self.pp) for tp in range(self.tp) for first in firsts]
        members = {place: [self.rank_at(*place[:2], place[2] + each) for each in range(self.cp)] for place in places}
        groups = {place: dist.new_group(ranks, WAIT, device_backend()) for place, ranks in members.items()}
        return groups[self.pp_rank, self.tp_rank, self.replica * self.cp]

    @cached_property
    def cp_rank(self) -> int:
        return dist.get_rank(self.cp_group)

    @cached_property
    def ep_rank(self) -> int:
        return dist.get_rank(self.ep_group)

    @cached_property
    def edp_rank(self) -> int:
        return dist.get_rank(self.edp_group)

    @cached_property
    def tp_rank(self) -> int:
        return dist.get_rank(self.tp_group)

    @cached_property
    def pp_rank(self) -> int:
        return dist.get_rank(self.pp_group)

    @cached_property
    def dp_rank(self) -> int:
        return dist.get_rank(self.dp_group)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm and the output layer."""
        return self.pp_rank == self.pp - 1

    def rank_at(self, pp_rank: int, tp_rank: int, dp_rank: int = 0) -> int:
        """Return the global rank at these coordinates (mcore's order: tp fastest, then dp, then pp)."""
        return tp_rank + self.tp * (dp_rank + self.dp * pp_rank)

    def rank_of_expert(self, pp_rank: int, ep_rank: int, edp_rank: int = 0) -> int:
        """Return the global rank at these expert coordinates (mcore's order: ep fastest, then expert-data, then pp)."""
        return ep_rank + self.ep * edp_rank + self.world // self.pp * pp_rank

    def stages(self, layers: int) -> list[list[int]]:
        """Return the layers of each model chunk in pipeline order: `pp * vp` lists; sizes differ by at most one, larger
        ones first.

        Chunk c lies on pipeline rank `c % pp` as its virtual stage `c // pp`. Raises TopologyError if one would be
        empty.
        """
        chunks = self.pp * self.vp
        if layers < chunks:
            raise TopologyError(
                f"{numbers.counted(layers, 'layer')} cannot fill {chunks} pipeline stages "
                f"(pp={self.pp} x vp={self.vp}). Use at most {numbers.counted(layers, 'stage')}."
            )
        short, longer = divmod(layers, chunks)
        ends = [0]
        for chunk in range(chunks):
            ends.append(ends[-1] + short + (chunk < longer))
        return [list(range(a, b)) for a, b in pairwise(ends)]

    def stage_of(self, layer: int, layers: int) -> int:
        """Return the pipeline rank that holds a layer."""
        return next(c % self.pp for c, stage in enumerate(self.stages(layers)) if layer in stage)


def _state() -> ModuleType:
    from megatron.core import parallel_state

    return parallel_state


def claim_device() -> str:
    """Select the GPU of this process's LOCAL_RANK, if there are any; return the torch.distributed backend to use.

    fp32 products on it are those of fp32: NVIDIA's images ask for TF32 (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), which errs
    by 1e-3. Raises TopologyError where LOCAL_RANK is beyond the GPUs.
    """
    if not torch.cuda.is_available():
        return "gloo"
    number, gpus = launched("LOCAL_RANK", 0), torch.cuda.device_count()
    if number >= gpus:
        raise TopologyError(
            f"LOCAL_RANK={number} needs {number + 1} GPUs, and this process sees {gpus}. Start at most "
            f"{numbers.counted(gpus, 'process', 'processes')} here (MINITRON_GPUS in Slurm's jobs), "
            "or let each see every GPU (CUDA_VISIBLE_DEVICES)."
        )
    torch.cuda.set_device(number)
    torch.set_float32_matmul_precision("highest")
    return "cpu:gloo,cuda:nccl"


class PlannedTopology(Topology):
    """Layout of processes that are not running: its sizes are known, its ranks and groups are not."""

    processes: Count = 1

    @property
    def world(self) -> int:
        return self.processes


def launched(variable: str, default: int) -> int:
    """Return a number that the launcher put into the environment, such as RANK or WORLD_SIZE.

    Raises TopologyError where it is not a whole number.
    """
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal():
        raise TopologyError(f"the environment has {variable}={text!r}, not a whole number. Correct or unset it.")
    return int(text)


def _launched_world() -> int:
    """Return the number of processes that the launcher started. Raises TopologyError if its variables are invalid."""
    world = launched("WORLD_SIZE", 1)
    if "RANK" not in os.environ:
        if world > 1:
            raise TopologyError(
                f"the environment has WORLD_SIZE={world} but no RANK. Unset it, or use launch/local.sh."
            )
        return 1
    rank, port = launched("RANK", 0), launched("MASTER_PORT", 0)
    if not (rank < world and 0 < port < 2**16 and os.environ.get("MASTER_ADDR")):
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        found = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in names)
        raise TopologyError(f"the environment cannot start processes: {found}. Use launch/local.sh or torchrun.")
    return world


def _join() -> None:
    """Join torchrun's process group where its variables are set; otherwise start a group of this process alone."""
    backend = claim_device()
    if "RANK" in os.environ:
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=JOIN))
            store.set_timeout(WAIT)  # NCCL waits there for the others when it first uses a group
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAIT)
        except (dist.DistError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise TopologyError(
                f"the processes cannot connect at {address} (MASTER_ADDR:MASTER_PORT): {reason}. Start them with "
                "another MASTER_PORT, or let launch/local.sh choose one."
            ) from error
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
