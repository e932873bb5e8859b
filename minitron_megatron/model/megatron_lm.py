"""A model as the checkpoint that Megatron-LM's training scripts load, at either of its layer specs."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import PARTIAL, whole_file
from ..parallel import Topology, barrier, fail_together, save_sharded
from .build import chunks_of
from .config import config_of
from .megatron_flags import FLAGS, arguments_script, check_megatron_lm, saved_arguments
from .writing import writing

__all__ = ["save_megatron_lm"]

RELEASE = "release"
"""What Megatron-LM calls a checkpoint of weights without an optimizer, as its own converters write."""
TRACKER = "latest_checkpointed_iteration.txt"

FUSED, ALONE = "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
"""Keys of the norm before a mixture: mcore's local spec has it renamed as a dense MLP's, the TE spec keeps its name."""
TE_NORMS = ("q_layernorm.weight", "k_layernorm.weight", ALONE + "weight", "final_layernorm.weight")
"""Norms that are modules of their own in the TE spec, where each asks for an `_extra_state` too."""
EXTRA = "_extra_state"


def save_megatron_lm(model: Any, folder: str | Path, topology: Topology, *, tokenizer: Path | None = None) -> None:
    """Write weights, and the arguments that build the model, in mcore's distributed format (`torch_dist`), which loads
    at any layout and at mcore's local and Transformer Engine specs. Collective over the world.

    The flags that Megatron-LM needs besides lie beside it (`megatron-args.sh`). tokenizer: the Hugging Face folder that
    they name. Raises CheckpointError where the folder exists or cannot be written, or Megatron-LM cannot express the
    model.
    """
    folder, chunks = Path(folder), chunks_of(model)
    config, dtype = config_of(chunks[0]), next(chunks[0].parameters()).dtype
    check_megatron_lm(config)
    with _new(folder, topology) as partial:
        sharded = {f"model{number}": _at_either_spec(chunk) for number, chunk in enumerate(chunks)}
        sharded = sharded if len(chunks) > 1 else {"model": sharded["model0"]}
        arguments = Namespace(**saved_arguments(config, _layout(topology), tokenizer))
        state = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, **sharded}
        with writing(str(folder), "Make room, or give another folder."):
            save_sharded(state, partial / RELEASE)
        if topology.rank == 0:
            for name, text in ((FLAGS, arguments_script(config, dtype, tokenizer)), (TRACKER, RELEASE)):
                with whole_file(partial / name) as file:
                    file.write_text(text, encoding="utf-8")


def _layout(topology: Topology) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "expert_model_parallel_size": topology.ep,
    }


def _at_either_spec(chunk: Any) -> dict[str, Any]:
    """Return a chunk's sharded state dict with the keys of both specs; Megatron-LM reads those that it asks for."""
    sharded = chunk.sharded_state_dict(metadata={})
    if config_of(chunk).shape.experts:
        sharded |= {f"other.{name}": _other_key(sharded[name]) for name in list(sharded) if ALONE in name}
    return _extra_states(sharded) | sharded


def _other_key(norm: Any) -> Any:
    """Return the norm before a mixture under the other spec's key."""
    pair = (FUSED, ALONE) if FUSED in norm.key else (ALONE, FUSED)
    return replace(norm, key=norm.key.replace(*pair))


def _extra_states(sharded: Mapping[str, Any]) -> dict[str, Any]:
    """Return an empty `_extra_state` for each norm of `TE_NORMS`, in the form in which mcore writes a module's own."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = {}
    for name, tensor in sharded.items():
        if getattr(tensor, "key", "").endswith(TE_NORMS):
            key, axes = tensor.key.removesuffix("weight") + EXTRA, tensor.prepend_axis_num
            place = tensor.global_shape[:axes] or (1,), tensor.global_offset[:axes] or (0,)
            states[name.removesuffix("weight") + EXTRA] = ShardedObject(key, None, *place, tensor.replica_id)
    return states


@contextmanager
def _new(folder: Path, topology: Topology) -> Iterator[Path]:
    """Yield a folder that all ranks fill, and that is there whole or not at all. Collective."""
    partial = folder.with_name(folder.name + PARTIAL)
    with fail_together():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} is not an empty folder. Give another one.")
        try:
            if topology.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / RELEASE).mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror}. Give another folder.") from error
    barrier()
    yield partial
    barrier()
    if topology.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    barrier()
