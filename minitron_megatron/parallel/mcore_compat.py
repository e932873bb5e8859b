"""Where megatron-core's versions differ, or where it must be mended: nowhere else."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import queue
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .context_shard import ContextShard

__all__ = [
    "FITS",
    "count_padding",
    "failed_alone",
    "failed_together",
    "final_hidden",
    "kill_writers",
    "load_optimizer",
    "mark_expert",
    "mend_distributed_optimizer",
    "quieten",
    "save_sharded",
    "undisturbed",
]

FITS = ("0.16.1", "0.19.2")
"""What this file and `backend.py` were read against: the default's (Python 3.11) and that of `make test-latest`."""

TALKERS = {
    "megatron.core.models.gpt.gpt_model": "deprecated",  # GPTModel for HybridModel
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout",  # it computes the buffers' itself
    "megatron.core.dist_checkpointing.strategies.common": "deprecated",  # common.pt
    "megatron.core.dist_checkpointing.strategies.torch": "deprecated",  # its own asynchronous writer
    "torch.utils.cpp_extension": "No CUDA runtime",  # at an import of mcore's, on a CPU
}
"""Who warns, under mcore 0.19, of what no user can act on, and the word that tells it."""


def quieten() -> None:
    """Keeps those warnings out of terminals and logs; everything else that is logged stays."""
    for logger in TALKERS:
        logging.getLogger(logger).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return TALKERS[record.name].lower() not in record.getMessage().lower()


def final_hidden(model: Any, tokens: Tensor, beside: Any = None) -> Tensor:
    """Runs a GPTModel up to its last layer and final norm, and no further: `GPTModel.forward` has no such switch.

    tokens: int64 [batch, seq]. beside: what attention has to know: [batch, seq], the number of each token's document,
    which it does not leave; or what came before, or which part of a sequence they are, either of which tells their
    `positions`. It takes the place of mcore's attention mask, and only our own core attention reads it so.
    Returns [seq (over tp, with sequence parallelism), batch, hidden]; before the last pipeline stage it is that stage's
    output. The model may be wrapped (DDP, Float16Module).
    """
    from megatron.core.utils import get_attr_wrapped_model

    gpt = get_attr_wrapped_model(model, "decoder", return_model_obj=True)
    # mcore 0.16-0.19: _preprocess returns (decoder_input, rotary_pos_emb, cos, sin, sequence_len_offset, padding_mask)
    states, rotary = gpt._preprocess(input_ids=tokens, position_ids=None)[:2]
    if hasattr(beside, "positions"):
        positions = beside.positions(tokens)
        most = -(-int(positions.max() + 1) // 256) * 256  # mcore keeps the angles of a few lengths
        rotary = gpt.rotary_pos_emb(most)[positions.t()].squeeze(2)
    carried = beside.ticket if isinstance(beside, ContextShard) else beside
    return gpt.decoder(hidden_states=states, attention_mask=carried, rotary_pos_emb=rotary)


def mend_distributed_optimizer() -> None:
    """Mends two faults of mcore 0.16's DistributedOptimizer with torch's Adam, which has no TE or apex to help it.

    Loading a checkpoint raises KeyError("step"), since only `param` and the moments are saved
    (optimizer/distrib_optimizer.py, `_set_main_param_and_optimizer_states`).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def copy_states(self: Any, model_param: Any, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for name, state in {"param": main, **self.optimizer.state[main]}.items():
            if name in tensors:
                state.copy_(tensors[name])

    DistributedOptimizer._set_main_param_and_optimizer_states = copy_states


def count_padding(wrapped: Sequence[Any]) -> None:
    """Has checkpoints hold all of a DDP's buffers, the padding between buckets included.

    mcore 0.16 writes the buckets one after the other without their padding, and reads parameters from where they lie
    with it (optimizer/distrib_optimizer.py, `sharded_param_state_fully_reshardable`). Where a shared weight has a
    bucket of its own, what follows it in the buffer gets its neighbours' optimizer states, and zeros at the end.
    """
    for chunk in wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def load_optimizer(optimizer: Any, state: Mapping[Any, Any]) -> None:
    """Fills an optimizer from what a checkpoint gave; the ends of its own learning rate's schedule stay.

    mcore would take the checkpoint's, where its scheduler looks first (optimizer_param_scheduler.py, `get_lr`), so that
    a phase would silently go on at the rates of the phase before; 0.19 finds no group where they differ. And it leaves
    all parameters sharing one Adam step count, which torch's Adam then advances once a parameter, so that the bias
    correction runs away silently.
    """
    own = optimizer.param_groups[0]
    for part in [state] if "optimizer" in state else state.values():
        for group in part["optimizer"]["param_groups"]:
            group.update(max_lr=own["max_lr"], min_lr=own["min_lr"])
    optimizer.load_state_dict(state)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for of_parameter in part.optimizer.state.values():
            if isinstance(of_parameter.get("step"), Tensor):
                of_parameter["step"] = of_parameter["step"].clone()


def mark_expert(parameter: Any) -> None:
    """Has an expert's gradient summed over the ranks that hold the same experts.

    mcore marks experts so only where ep > 1 (tensor_parallel/layers.py, `allreduce`); at ep = 1 beside tp > 1 each rank
    of tp would keep the gradient of its own part of the sequence, silently.
    """
    parameter.allreduce = False


class _Results:
    """What the processes that write a checkpoint tell the one that trains, in a file without a name."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the request that holds it)

    def put(self, results: Any) -> None:
        pickle.dump(results, self.file)
        self.file.flush()

    def get_nowait(self) -> Any:
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except EOFError:
            raise queue.Empty from None


@contextmanager
def _writes_collected() -> Iterator[None]:
    """Within it, mcore's next checkpoint collects what its writers did in a file of this process.

    mcore spawns a manager process for it (dist_checkpointing/strategies/filesystem_async.py, `_results_queue`), which
    takes seconds to start and outlives a killed run.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = filesystem_async._results_queue
    filesystem_async._results_queue = _Results()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def save_sharded(state: Mapping[str, Any], folder: str | Path, *, later: bool = False) -> Any:
    """mcore's distributed checkpoint of a sharded state dict, in a folder that is there and empty. Collective.

    later: only what must not change any more is copied; returns the AsyncRequest that writes.
    """
    from megatron.core import dist_checkpointing

    with _writes_collected():
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            return _save_with_common_file(dict(state), Path(folder), later)
        return dist_checkpointing.save(dict(state), str(folder), async_sharded_save=later)


def _save_with_common_file(state: dict[str, Any], folder: Path, later: bool) -> Any:
    """As 0.16 writes it, for 0.19, which reads both: what is no tensor lies in common.pt, which is opened weights-only.

    0.19 itself (dist_checkpointing/serialization.py, `save`) puts it among the objects that torch unpickles freely. And
    its asynchronous writer would be another package's.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    _mend_writer()
    sharded, common = save_preprocess(state)
    if dist.get_rank() == 0:
        torch.save(common, folder / COMMON_STATE_FNAME)
    strategy = TorchDistSaveShardedStrategy()

    def say_what_it_is() -> None:
        if dist.get_rank() == 0:
            save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))
        dist.barrier()

    request = strategy.async_save(sharded, folder, "mcore")
    request.add_finalize_fn(say_what_it_is)
    return request if later else request.execute_sync()


def _mend_writer() -> None:
    """Has mcore 0.19's writer say why it could not write.

    It asserts that a result is none of its own exceptions (dist_checkpointing/strategies/filesystem_async.py,
    `check_local_output`), so that nothing but their type would come back.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    plain = FileSystemWriterAsync.write_preloaded_data
    if plain.__module__ == __name__:
        return

    def write(*args: Any, **kwargs: Any) -> Any:
        done = plain(*args, **kwargs)
        if kwargs["results_queue"] is None and isinstance(done[1], Exception):
            raise done[1]
        return done

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


def undisturbed(request: Any) -> Any:
    """mcore's AsyncRequest, whose processes do not hear the terminal's Ctrl-C and end together (`kill_writers`)."""
    return request._replace(async_fn=request.async_fn and partial(_in_own_group, request.async_fn))


def _in_own_group(work: Any, *args: Any, **kwargs: Any) -> None:
    os.setpgid(0, 0)
    work(*args, **kwargs)


def kill_writers(caller: Any) -> None:
    """Kills the processes of mcore's async caller that an `undisturbed` request runs in.

    mcore kills the first alone; those that it forked would wait for it for ever, its standard error in their hands.
    """
    if caller.process is not None:
        with suppress(ProcessLookupError):  # it has ended, or has no group yet and nothing forked
            os.killpg(caller.process.pid, signal.SIGKILL)
        caller.process.kill()
        caller.process = None


def failed_together() -> tuple[type[BaseException], ...]:
    """What torch raises on every rank where one could not write its part; it is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    return (CheckpointException,)


def failed_alone(error: Exception) -> bool:
    """Whether this rank's own file system is at fault: torch's writer of zip files hides the OSError, and a rank that
    lost the others has a RuntimeError too."""
    return isinstance(error, OSError) or any(word in str(error) for word in ("inline_container", "iostream error"))
