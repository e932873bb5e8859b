"""Names of keys: a suggestion for an unknown one, and the key of an argument that an error of a lower room names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import MinitronError, did_you_mean
from .schema import json_schema

__all__ = ["key_paths", "nearest_key", "with_keys", "with_keys_in_errors"]

Schema = Mapping[str, Any]
"""JSON Schema, or a part of it."""

OTHER_WORDS: Mapping[str, tuple[str, ...]] = {
    "lr": ("learning_rate", "max_lr", "peak_lr", "lr_max", "base_lr"),
    "min_lr": ("minimum_learning_rate", "lr_min", "final_lr", "end_lr", "min_learning_rate"),
    "warmup_steps": ("warmup", "warmup_iters", "lr_warmup_iters", "lr_warmup_steps", "num_warmup_steps"),
    "weight_decay": ("wd", "decay"),
    "clip": ("clip_grad", "max_grad_norm", "grad_clip", "gradient_clip_val", "gradient_clipping"),
    "tokens": ("steps", "max_steps", "train_iters", "num_tokens", "train_tokens", "token_budget", "budget"),
    "global_batch": ("global_batch_size", "batch_size", "gbs", "batch"),
    "micro_batch": ("micro_batch_size", "mbs", "per_device_train_batch_size", "batch_size", "batch"),
    "save_every": ("save_interval", "save_steps", "checkpoint_every"),
    "validate_every": ("eval_interval", "eval_steps", "val_check_interval", "eval_every"),
    "sequence": ("seq_length", "sequence_length", "seq_len", "max_length", "context_length", "block_size"),
    "sources": ("data_path", "datasets", "dataset", "files", "corpora", "train_files"),
    "path": ("file", "name", "dataset", "paths"),
    "validation": ("val", "valid", "eval", "held_out", "split"),
    "text_key": ("json_key", "json_keys", "text_field", "text_column", "key"),
    "loss_on": ("train_on", "mask", "loss_mask", "train_on_inputs", "assistant_only_loss", "answer_only_loss"),
    "workers": ("num_workers", "num_proc"),
    "model": ("teacher", "model_path", "model_name", "checkpoint", "base_model", "teacher_path", "hf_model"),
    "out": ("output", "output_dir", "out_dir", "save_dir", "run_dir", "save"),
    "dtype": ("precision", "torch_dtype", "params_dtype"),
    "seed": ("random_seed", "rng_seed"),
    "hidden": ("hidden_size", "d_model", "embedding", "n_embd"),
    "ffn": ("ffn_hidden_size", "intermediate_size", "mlp", "neurons"),
    "heads": ("num_attention_heads", "attention_heads", "n_head", "num_heads"),
    "kv_groups": ("num_key_value_heads", "num_query_groups", "kv_heads", "num_kv_heads"),
    "layers": ("num_layers", "num_hidden_layers", "n_layer", "depth"),
    "experts": ("num_experts", "num_moe_experts", "num_local_experts"),
    "expert_ffn": ("moe_ffn_hidden_size", "moe_intermediate_size"),
    "tp": ("tensor_parallel", "tensor_model_parallel_size", "tensor_parallel_size", "tp_size"),
    "pp": ("pipeline_parallel", "pipeline_model_parallel_size", "pipeline_parallel_size", "pp_size"),
    "vp": ("virtual_pipeline_model_parallel_size", "vpp"),
    "ep": ("expert_parallel", "expert_model_parallel_size", "ep_size"),
    "cp": ("context_parallel", "context_parallel_size", "cp_size"),
    "samples": ("calibration_samples", "num_samples", "calib_size"),
    "divergence": ("kd_loss", "loss_type", "kl"),
    "ce_weight": ("lm_weight", "alpha", "ce_loss_weight"),
    "distill": ("distillation", "kd", "train", "training"),
    "correct": ("correction", "teacher_correction", "finetune"),
    "prune": ("pruning", "target"),
    "score": ("importance", "calibration", "scoring"),
    "evaluate": ("evaluation", "eval"),
    "tasks": ("benchmarks",),
    "shots": ("num_fewshot", "fewshot", "n_shot"),
    "quantize": ("quantization", "fp8"),
    "wandb": ("wandb_mode",),
    "independent_replicas": ("apart",),
}
"""Key -> names that other tools use for it."""


def nearest_key(loc: Sequence[int | str]) -> str:
    """Return ` Did you mean 'x'?` for the unknown key at `loc` in a recipe, or the empty string."""
    schema = json_schema()
    *place, last = loc
    word = str(last)
    known = list(_block(place, schema).get("properties", ()))
    if meant := [key for key in known if word.lower().replace("-", "_") in (key, *OTHER_WORDS.get(key, ()))]:
        return f" Did you mean {' or '.join(map(repr, meant))}?"
    if near := did_you_mean(word, known):
        return near
    names = {word, *(key for key, words in OTHER_WORDS.items() if word.lower() in words)}
    elsewhere = [path for path in _paths(schema, schema) if path.rpartition(".")[2] in names]
    return f" Did you mean {' or '.join(map(repr, elsewhere[:3]))}?" if elsewhere else ""


def key_paths() -> list[str]:
    """Return the path of every key, outermost first."""
    schema = json_schema()
    return list(_paths(schema, schema))


def with_keys(text: str, block: str = "") -> str:
    """Return a message of a lower room with recipe keys in place of arguments: `` `text_key` `` becomes data.text_key.

    An argument in backticks is the one key of its name in `block`, or else in the whole recipe but for the rounds of
    alignment. Where there is no such key, or several, it stays.
    """
    paths = key_paths()

    def key(found: re.Match[str]) -> str:
        named = [path for path in paths if path.rpartition(".")[2] == found[1]]
        everywhere = [path for path in named if not path.startswith("align[]")] or named
        inside = [path for path in named if path.startswith(f"{block}.")]
        matching = inside or everywhere
        return matching[0] if len(matching) == 1 else found[0]

    return re.sub(r"`(\w+)`", key, text)


@contextmanager
def with_keys_in_errors(block: str = "") -> Iterator[None]:
    """Name recipe keys in the MinitronErrors that leave the block of code, as `with_keys` does."""
    try:
        yield
    except MinitronError as error:
        error.args = (with_keys(str(error), block),)
        raise


def _block(place: Sequence[int | str], schema: Schema) -> Schema:
    """Return the schema of the block at a place in the tree; empty if there is no block."""
    at: Schema = schema
    for part in place:
        if str(part).startswith("("):  # tag of a union
            at = schema["$defs"][str(part).strip("()")]
            continue
        inner = at.get("items", {}) if isinstance(part, int) else at.get("properties", {}).get(part, {})
        at = _resolved(inner, schema)
    return at


def _resolved(node: Schema, schema: Schema) -> Schema:
    """Follow `$ref`s and the non-null side of an optional block."""
    for choice in node.get("anyOf", ()):
        if "$ref" in choice:
            node = choice
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node


def _paths(block: Schema, schema: Schema, before: str = "") -> Iterator[str]:
    """Yield every key's path, outermost first; keys of a block in a list as `data.sources[].validation`.

    Of blocks of several kinds, the keys of each.
    """
    if kinds := block.get("oneOf"):
        yield from dict.fromkeys(path for kind in kinds for path in _paths(_resolved(kind, schema), schema, before))
        return
    inner = {name: _resolved(node, schema) for name, node in block.get("properties", {}).items()}
    yield from (f"{before}{name}" for name in inner)
    for name, node in inner.items():
        yield from _paths(node, schema, f"{before}{name}.")
        yield from _paths(_resolved(node.get("items", {}), schema), schema, f"{before}{name}[].")
