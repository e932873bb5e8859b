"""All code that depends on megatron-core's version or works around one of its bugs, without patching it."""

from __future__ import annotations

import inspect
import logging
import os
import signal
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from .attention_context import AttentionContext
from .mcore_patches import mend_writer, writes_collected

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

__all__ = [
    "FITS",
    "count_padding",
    "drop_absent_states",
    "failed_alone",
    "failed_together",
    "final_hidden",
    "keep_own_states",
    "kill_writers",
    "load_optimizer",
    "mark_expert",
    "quieten",
    "save_sharded",
    "undisturbed",
]

P = ParamSpec("P")

OptimizerState = MutableMapping[Any, Any]
"""State dict of one of mcore's optimizers, or of a chain of them by their number."""

FITS = ("0.16.1", "0.19.2")
"""Versions that this file and the patches support: the default (Python 3.11) and the one of `make test-latest`."""

NOISY_LOGGERS = {
    "megatron.core.models.gpt.gpt_model": "deprecated",  # GPTModel, in favour of HybridModel
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout",  # DDP computes the layout itself
    "megatron.core.dist_checkpointing.strategies.common": "deprecated",  # common.pt
    "megatron.core.dist_checkpointing.strategies.torch": "deprecated",  # its own asynchronous writer
    "torch.utils.cpp_extension": "No CUDA runtime",  # when mcore imports it, on a CPU
}
"""Logger -> word of the warnings that it emits under mcore 0.19 and that no user can act on."""


def quieten() -> None:
    """Filter the warnings of `NOISY_LOGGERS` out of terminals and logs; all other records stay."""
    for logger in NOISY_LOGGERS:
        logging.getLogger(logger).addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return NOISY_LOGGERS[record.name].lower() not in record.getMessage().lower()


def final_hidden(
    model: object, tokens: Int64[Tensor, "batch seq"], attention_context: AttentionContext | None = None
) -> Float[Tensor, "local_seq batch hidden"]:
    """Run a GPTModel up to its final norm, without the output layer: `GPTModel.forward` has no such switch.

    attention_context: passed as mcore's attention mask; only our core attention reads it.
    With sequence parallelism, the states are those of this rank's part of the sequence; before the last pipeline stage,
    they are that stage's output. The model may be wrapped (DDP, Float16Module).
    """
    from megatron.core.utils import get_attr_wrapped_model

    gpt = get_attr_wrapped_model(model, "decoder", return_model_obj=True)
    # mcore 0.16-0.19: _preprocess returns (decoder_input, rotary_pos_emb, cos, sin, sequence_len_offset, padding_mask)
    states, rotary = gpt._preprocess(input_ids=tokens, position_ids=None)[:2]
    positions = attention_context.positions(tokens) if attention_context else None
    if positions is not None:
        most = -(-int(positions.max() + 1) // 256) * 256  # rounded up, since mcore caches angles by length
        rotary = gpt.rotary_pos_emb(most)[positions.t()].squeeze(2)
    mask = attention_context.as_mask() if attention_context else None
    return gpt.decoder(hidden_states=states, attention_mask=mask, rotary_pos_emb=rotary)


def count_padding(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Make checkpoints hold the whole DDP buffers, with the padding between buckets.

    mcore 0.16 writes the buckets without their padding, but reads each parameter from its offset with padding
    (optimizer/distrib_optimizer.py, `sharded_param_state_fully_reshardable`). Where a shared weight has its own bucket,
    the parameters after it in the buffer would load their neighbours' optimizer states, and zeros at the end.
    """
    for chunk in wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def keep_own_states(optimizer: MegatronOptimizer, state: OptimizerState) -> None:
    """Drop from a state dict to load the states of parameters of which this rank's optimizer holds no part.

    mcore asks for all states on every rank, 12 bytes a parameter of host memory, and uses its own part of them
    (optimizer/distrib_optimizer.py, `load_parameter_state_from_fully_reshardable`).
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part, of_part in zip(parts, _parts(state), strict=True):
        buckets = [bucket for ranges in part.gbuf_ranges for of_dtype in ranges.values() for bucket in of_dtype]
        own = {parameter for bucket in buckets for parameter in bucket["param_map"]}
        every = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]  # in mcore's order
        of_part["param_state"] = {at: each for at, each in of_part["param_state"].items() if every[at] in own}


def drop_absent_states(state: OptimizerState) -> None:
    """Drop from a state dict to save the empty place of states that another rank writes.

    mcore would warn on each save that the ranks differ there.
    """
    for part in _parts(state):
        if part["param_state"] is None:
            del part["param_state"]


def _parts(state: OptimizerState) -> list[OptimizerState]:
    """Return the state dicts of the optimizers that one of mcore's chains."""
    return [state] if "param_state" in state else list(state.values())


def load_optimizer(optimizer: MegatronOptimizer, state: OptimizerState) -> None:
    """Load a checkpoint's optimizer state, but keep the optimizer's own maximum and minimum learning rate.

    mcore would take both from the checkpoint, where its scheduler looks first (optimizer_param_scheduler.py, `get_lr`):
    a phase would silently continue at the rates of the phase before. mcore 0.19 does not find the parameter group where
    they differ. mcore also makes all parameters share one Adam step tensor; torch's Adam then increments it once per
    parameter, which silently breaks the bias correction. So each parameter gets its own copy.
    """
    own = optimizer.param_groups[0]
    for part in [state] if "optimizer" in state else state.values():
        for group in part["optimizer"]["param_groups"]:
            group.update(max_lr=own["max_lr"], min_lr=own["min_lr"])
    optimizer.load_state_dict(state)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter_state in part.optimizer.state.values():
            if isinstance(parameter_state.get("step"), Tensor):
                parameter_state["step"] = parameter_state["step"].clone()


def mark_expert(parameter: Any) -> None:
    """Mark an expert's parameter, so that its gradient is summed over the ranks that hold the same expert.

    mcore sets this mark only where ep > 1 (tensor_parallel/layers.py, `allreduce`). At ep = 1 and tp > 1, each tp rank
    would silently keep the gradient of its own part of the sequence.
    """
    parameter.allreduce = False


def save_sharded(state: Mapping[str, object], folder: str | Path, *, later: bool = False) -> Any:
    """Write a sharded state dict as mcore's distributed checkpoint into an existing, empty folder. Collective.

    later: only copy the tensors, and return the AsyncRequest that writes them.
    """
    from megatron.core import dist_checkpointing

    with writes_collected():
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            return _save_with_common_file(dict(state), Path(folder), later)
        return dist_checkpointing.save(dict(state), str(folder), async_sharded_save=later)


def _save_with_common_file(state: dict[str, object], folder: Path, later: bool) -> AsyncRequest | None:
    """Write with mcore 0.19 in 0.16's format, which 0.19 reads too: values that are not tensors go to common.pt, which
    is loaded weights-only.

    0.19 itself (dist_checkpointing/serialization.py, `save`) stores them among objects that torch unpickles without
    checks, and its asynchronous writer needs another package.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    mend_writer()
    sharded, common = save_preprocess(state)
    if dist.get_rank() == 0:
        torch.save(common, folder / COMMON_STATE_FNAME)
    strategy = TorchDistSaveShardedStrategy()

    def write_format() -> None:
        if dist.get_rank() == 0:
            save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))
        dist.barrier()

    request = strategy.async_save(sharded, folder, "mcore")
    request.add_finalize_fn(write_format)
    return request if later else request.execute_sync()


def undisturbed(request: AsyncRequest) -> AsyncRequest:
    """Return mcore's AsyncRequest with its writers in a process group of their own: Ctrl-C in the terminal does not
    reach them, and `kill_writers` ends them together."""
    return request._replace(async_fn=request.async_fn and partial(_in_own_group, request.async_fn))


def _in_own_group(work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    os.setpgid(0, 0)
    work(*args, **kwargs)


def kill_writers(caller: TemporalAsyncCaller) -> None:
    """Kill the writer processes of mcore's async caller that runs an `undisturbed` request.

    mcore kills only the first process; those that it forked would wait forever and keep its standard error open.
    """
    if caller.process is not None:
        with suppress(ProcessLookupError):  # it has ended, or has no group yet and has forked nothing
            os.killpg(caller.process.pid, signal.SIGKILL)
        caller.process.kill()
        caller.process = None


def failed_together() -> tuple[type[BaseException], ...]:
    """Return the exceptions (not subclasses of Exception) that torch raises on every rank if one rank cannot write."""
    from torch.distributed.checkpoint.api import CheckpointException

    return (CheckpointException,)


def failed_alone(error: Exception) -> bool:
    """Return whether this rank's own file system caused the error.

    torch's zip writer turns an OSError into a RuntimeError, which a rank that lost contact to the others raises too:
    the message tells them apart.
    """
    return isinstance(error, OSError) or any(word in str(error) for word in ("inline_container", "iostream error"))
