"""Export of a model as a checkpoint that Megatron-LM's training scripts load, with either of its layer specs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, FileError
from ..files import PARTIAL, whole_file, whole_folder
from ..parallel import Topology, barrier, fail_together, save_sharded
from .chunk import Chunk, Model, chunks_of
from .megatron_flags import FLAGS, arguments_script, check_megatron_lm, saved_arguments
from .megatron_names import shape_of
from .read_model import config_of
from .writing import writing

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor

__all__ = ["save_megatron_lm"]

RELEASE = "release"
"""Megatron-LM's name for a checkpoint of weights without an optimizer, as its own converters write it."""
TRACKER = "latest_checkpointed_iteration.txt"

FUSED, ALONE = "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
"""Keys of the norm before an MoE: mcore's local spec renames it as before a dense MLP, the TE spec does not."""
TE_NORMS = ("q_layernorm.weight", "k_layernorm.weight", ALONE + "weight", "final_layernorm.weight")
"""Norms that are separate modules in the TE spec; each then requires an `_extra_state` in the checkpoint."""
EXTRA = "_extra_state"


def save_megatron_lm(model: Model, folder: str | Path, topology: Topology, *, tokenizer: Path | None = None) -> None:
    """Write weights and model arguments in mcore's distributed format (`torch_dist`). Collective over the world.

    The checkpoint loads at any layout, with mcore's local and Transformer Engine specs. `megatron-args.sh` in the same
    folder sets the other flags that Megatron-LM needs. tokenizer: the Hugging Face folder that these flags name. Raises
    CheckpointError where the folder is not empty or cannot be written, or where Megatron-LM cannot express the model.
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


def _at_either_spec(chunk: Chunk) -> ShardedStateDict:
    """Return a chunk's sharded state dict with the keys of both specs; Megatron-LM reads only those of its spec."""
    sharded = chunk.sharded_state_dict(metadata={})
    if shape_of(chunk).experts:
        sharded |= {f"other.{name}": _other_key(sharded[name]) for name in list(sharded) if ALONE in name}
    return _extra_states(sharded) | sharded


def _other_key(norm: ShardedTensor) -> ShardedTensor:
    """Return the norm before an MoE under the other spec's key."""
    old_and_new = (FUSED, ALONE) if FUSED in norm.key else (ALONE, FUSED)
    return replace(norm, key=norm.key.replace(*old_and_new))


def _extra_states(sharded: ShardedStateDict) -> ShardedStateDict:
    """Return an empty `_extra_state` for each norm of `TE_NORMS`, in the form in which mcore writes them."""
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
    """Yield a temporary folder for all ranks to fill; on success it is renamed to `folder`. Collective."""
    with ExitStack() as held:
        with fail_together():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CheckpointError(f"{folder} exists and is not an empty folder. Give another one.")
            try:
                if topology.rank == 0:
                    (held.enter_context(whole_folder(folder)) / RELEASE).mkdir()
            except FileError as error:
                raise CheckpointError(f"{error} Give another folder.") from error
        yield folder.with_name(folder.name + PARTIAL)
        barrier()
        with fail_together():
            held.close()
