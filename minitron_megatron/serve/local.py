"""Measure prefill and decoding of Hugging Face folders in this process, to compare models on any machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from ..convert import transformers_failures, transformers_model
from .throughput import Measured, Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["measure_locally"]


ForwardPass = Callable[..., "CausalLMOutputWithPast"]
"""Forward pass of a model, compiled or not."""


@torch.inference_mode()
def measure_locally(folders: list[Path], workload: Workload, *, repeats: int = 3) -> list[Measured]:
    """Measure each model on the same batch of `workload.batch` random requests, with a static KV cache; medians.

    The models take turns, and all are in memory at once. On a GPU a decoding step is one CUDA graph. A folder without
    weights gets random ones, which take the same time. Raises CheckpointError if transformers cannot read or run a
    folder.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [transformers_model(each, random=not any(each.glob("*.safetensors"))).to(device) for each in folders]
    steps = [_step(model) for model in models]
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for folder, model, step, seconds in zip(folders, models, steps, times, strict=True):
            with transformers_failures("run", folder):
                measured = _serve(model, step, workload)
            if turn:  # the first turn is a warm-up
                seconds.append(measured)
    return [_measured(seconds, workload) for seconds in times]


def _step(model: PreTrainedModel) -> ForwardPass:
    cuda = next(model.parameters()).device.type == "cuda"
    return torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if cuda else model.forward


def _serve(model: PreTrainedModel, step: ForwardPass, workload: Workload) -> tuple[float, float]:
    """Serve one batch of requests; return the seconds of (prefill, decoding)."""
    from transformers import StaticCache

    device, total = next(model.parameters()).device, workload.inputs + workload.outputs
    cache = StaticCache(config=model.config, max_cache_len=total)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (workload.batch, workload.inputs), generator=generator)
    began = _now(device)
    positions = torch.arange(workload.inputs, device=device)
    out = model(tokens.to(device), past_key_values=cache, cache_position=positions, logits_to_keep=1)
    filled = _now(device)
    for at in range(workload.inputs, total - 1):
        token = out.logits[:, -1:].argmax(-1)
        out = step(token, past_key_values=cache, cache_position=torch.tensor([at], device=device))
    return filled - began, _now(device) - filled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _measured(seconds: list[tuple[float, float]], workload: Workload) -> Measured:
    prefill, decode = (median(each) for each in zip(*seconds, strict=True))
    return Measured(
        tokens_per_second=workload.batch * workload.outputs / (prefill + decode),
        requests_per_second=workload.batch / (prefill + decode),
        latency_ms=1000 * (prefill + decode),
        first_token_ms=1000 * prefill,
        token_ms=1000 * decode / max(1, workload.outputs - 1),
        gpus=1,
    )
