"""Processes and process groups: the only package that calls mcore's parallel_state.

torch.distributed is called here, by `rehearsal`, which stands in for other ranks, and by the worker pool of `testing`.

Knows: ranks, groups, devices, the placement of layers on pipeline stages, the patches that mcore needs on a CPU,
functions that torch.compile makes one kernel of, and the differences between mcore's versions. Must not know: scores,
plans, losses, recipes.
"""

from . import kernels
from .attention_context import AttentionContext
from .backend import has_cpu_backend, install_cpu_backend, peak_bytes, peak_flops
from .collectives import (
    Group,
    all_reduce,
    all_to_all,
    barrier,
    broadcast_object,
    fail_together,
    first_to_fail,
    gather_objects,
    gather_sequence,
    group_rank,
    group_size,
    local_sequence,
    move,
    place_in_world,
    scatter_sequence,
    sum_gradient,
    sum_over_world,
)
from .context_shard import ContextShard
from .kernels import one_kernel
from .mcore_compat import (
    FITS,
    count_padding,
    drop_absent_states,
    failed_alone,
    failed_together,
    final_hidden,
    keep_own_states,
    kill_writers,
    load_optimizer,
    mark_expert,
    quieten,
    save_sharded,
    undisturbed,
)
from .mcore_patches import mend_distributed_optimizer
from .replicas import check_independent_replicas, independent_replicas
from .topology import Parallel, PlannedTopology, Topology, claim_device, launched

__all__ = [
    "FITS",
    "AttentionContext",
    "ContextShard",
    "Group",
    "Parallel",
    "PlannedTopology",
    "Topology",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast_object",
    "check_independent_replicas",
    "claim_device",
    "count_padding",
    "drop_absent_states",
    "fail_together",
    "failed_alone",
    "failed_together",
    "final_hidden",
    "first_to_fail",
    "gather_objects",
    "gather_sequence",
    "group_rank",
    "group_size",
    "has_cpu_backend",
    "independent_replicas",
    "install_cpu_backend",
    "keep_own_states",
    "kernels",
    "kill_writers",
    "launched",
    "load_optimizer",
    "local_sequence",
    "mark_expert",
    "mend_distributed_optimizer",
    "move",
    "one_kernel",
    "peak_bytes",
    "peak_flops",
    "place_in_world",
    "quieten",
    "save_sharded",
    "scatter_sequence",
    "sum_gradient",
    "sum_over_world",
    "undisturbed",
]
