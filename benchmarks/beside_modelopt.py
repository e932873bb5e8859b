"""Kept sets and KL divergence beside those of NVIDIA ModelOpt, by its own classes, on a CPU.

    python benchmarks/beside_modelopt.py [MODEL]     # the quickstart's teacher, unless given

Kept sets: ModelOpt's `L2NormHook` watches a Hugging Face model, of which its rules (mcore_minitron.py: norms of the
layers for `hidden`, heads ranked within their group) keep half of each axis; ours scores and chooses on the same
samples. KL: `LogitsKLLoss` on logits of hidden states, ours from the hidden states, forward and backward, in pairs, one
thread, median of 5.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from distill_loss import Inputs, extra, fused, inputs, seconds
from modelopt import __version__
from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
from modelopt.torch.prune.importance_hooks.base_hooks import L2NormHook
from record import record
from torch import Tensor

from minitron_megatron.convert import load_hf
from minitron_megatron.data import Batch
from minitron_megatron.model import shape_of
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose
from minitron_megatron.score import score

SAMPLES, SEQUENCE, MICRO_BATCH = 64, 128, 8
TOKENS, VOCAB, REPEATS = (256, 2048), 32768, 5
TEACHER = Path(__file__).parents[1] / "examples" / "quickstart" / "teacher"


def batches(vocab: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(SAMPLES // MICRO_BATCH):
        tokens = torch.randint(0, vocab, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
        made.append(Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(MICRO_BATCH, SEQUENCE, dtype=torch.bool)))
    return made


def watched(modules: Sequence[torch.nn.Module], *, output: bool = False) -> list[L2NormHook]:
    """Return ModelOpt's hooks on the input, or the output, of each module; they want the sequence first."""
    hooks = [L2NormHook() for _ in modules]
    for module, hook in zip(modules, hooks, strict=True):

        def see(module: Any, given: Any, found: Tensor, hook: L2NormHook = hook) -> None:
            hook(module, ((found if output else given[0]).transpose(0, 1),), found)

        module.register_forward_hook(see)
    return hooks


@torch.no_grad()
def modelopt_keeps(model: Path, data: Sequence[Batch]) -> dict[str, list[list[int]]]:
    """Return the units of each axis that ModelOpt's scores keep: of the model, or of each layer."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers, config = hf.model.layers, hf.config
    ffn = watched([layer.mlp.down_proj for layer in layers])
    heads = watched([layer.self_attn.o_proj for layer in layers])
    each_norm = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms = watched(each_norm, output=True)
    for batch in data:
        hf(batch.tokens)
    hidden = torch.stack([hook.accumulate() for hook in norms]).sum(0)
    per_group = config.num_attention_heads // config.num_key_value_heads
    return {
        "hidden": [_best(hidden, len(hidden) // 2)],
        "ffn": [_best(hook.accumulate(), config.intermediate_size // 2) for hook in ffn],
        "heads": [_best_heads(hook.accumulate().view(config.num_attention_heads, -1), per_group) for hook in heads],
    }


def _best(scores: Tensor, keep: int) -> list[int]:
    return sorted(scores.argsort(descending=True)[:keep].tolist())


def _best_heads(scores: Tensor, per_group: int) -> list[int]:
    groups = torch.linalg.vector_norm(scores, ord=2, dim=1).view(-1, per_group)
    return [at * per_group + head for at, group in enumerate(groups) for head in _best(group, per_group // 2)]


def our_keeps(model: Path, data: Sequence[Batch], topology: Topology) -> dict[str, list[list[int]]]:
    teacher = load_hf(model, topology)
    shape = shape_of(teacher[0])
    plan = choose(
        score(teacher, data, axes=("hidden", "ffn", "heads"), topology=topology),
        **{axis: shape.axis_size(axis) // 2 for axis in ("hidden", "ffn", "heads")},
    )
    return {
        axis: [list(kept[at]) for at in sorted(kept, key=lambda layer: layer or 0)] for axis, kept in plan.keep.items()
    }


def modelopt_kl(of: Inputs) -> None:
    """ModelOpt's KL of all tokens, from hidden states: with its output layers."""
    hidden, weight, teacher_hidden, teacher_weight = of
    with torch.no_grad():
        targets = teacher_hidden @ teacher_weight.t()
    loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1))  # type: ignore[arg-type]
    loss(hidden @ weight.t(), targets)[0].sum().backward()


def kl(topology: Topology, tokens: int) -> dict[str, Any]:
    of = inputs(tokens, VOCAB)
    ours, theirs = partial(fused, topology, tokens, VOCAB, of), partial(modelopt_kl, of)
    bytes_ours, bytes_theirs = (extra(work, of) for work in (ours, theirs))  # also the warm-up
    gradients = []
    for work in (ours, theirs):
        seconds(work, of)
        gradients.append([each.grad.clone() for each in of[:2] if each.grad is not None])
    times = [(seconds(ours, of), seconds(theirs, of)) for _ in range(REPEATS)]
    return {
        "tokens": tokens,
        "time_ratio": median(a / b for a, b in times),
        "time_ratio_all": [a / b for a, b in times],
        "extra_bytes": [bytes_ours, bytes_theirs],
        "largest_gradient_difference": max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Kept sets and KL beside ModelOpt's.")
    parser.add_argument("model", nargs="?", type=Path, default=TEACHER)
    model = parser.parse_args().model
    torch.set_num_threads(1)
    topology = Topology.start()
    data = batches(shape_of(load_hf(model, topology)[0]).vocab)
    theirs, ours = modelopt_keeps(model, data), our_keeps(model, data, topology)
    record(
        "beside_modelopt",
        modelopt=__version__,
        model=model.name,
        kept_sets_equal={axis: ours[axis] == theirs[axis] for axis in theirs},
        kept={axis: f"{len(kept[0])} in {len(kept)}" for axis, kept in theirs.items()},
        kl=[kl(topology, tokens) for tokens in TOKENS],
    )


if __name__ == "__main__":
    main()
