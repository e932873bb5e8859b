"""Cost of the fused KL, including output layers, compared with a loss that materialises all logits.

    python benchmarks/distill_loss.py

Bounds, at 2,048 tokens, vocabulary 32,768, hidden 512, fp32, forward and backward: a live peak beyond inputs and
returned gradients of at most 0.25 of one local tensor of fp32 logits, at TP1, TP2 and with sequence parallelism; at TP1
at most the time of the unfused loss, measured in pairs, one thread, median of 5. Then both for several vocabulary and
token counts, each once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from minitron_megatron.losses import Output, Vocabulary, distill_loss
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import LivePeak, Pool

TOKENS, VOCAB, HIDDEN = 2048, 32768, 512
CURVE = ((256, 32768), (4096, 32768), (1024, 65536), (512, 131072), (256, 262144))
SPLIT: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
}
REPEATS = 5

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(tokens: int, held: int) -> Inputs:
    """Return hidden states [tokens, 1, h] and output weight [local vocab, h] of the student (with gradients) and of the
    teacher."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, 1, HIDDEN), (held, HIDDEN)) * 2
    drawn = [torch.randn(shape, generator=generator) / HIDDEN**0.25 for shape in shapes]
    return drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2], drawn[3]


def fused(topology: Topology, tokens: int, vocab: int, of: Inputs) -> None:
    distill_loss(
        Output(*of[:2]),
        Output(*of[2:]),
        torch.ones(1, tokens, dtype=torch.bool),
        Vocabulary(vocab, topology.tp_group, topology.sequence_parallel),
    ).backward()


def unfused(of: Inputs) -> None:
    """Compute the loss by plain torch, with all logits at once."""
    hidden, weight, teacher_hidden, teacher_weight = of
    with torch.no_grad():
        log_q = (teacher_hidden.flatten(0, 1) @ teacher_weight.t()).log_softmax(-1)
    log_p = (hidden.flatten(0, 1) @ weight.t()).log_softmax(-1)
    F.kl_div(log_p, log_q, reduction="sum", log_target=True).backward()


def forget(of: Inputs) -> None:
    of[0].grad = of[1].grad = None


def extra(work: Callable[[], None], of: Inputs) -> int:
    """Return the live peak in bytes, beyond inputs and resulting gradients."""
    forget(of)
    with LivePeak() as meter:
        work()
    gradients = sum(each.grad.nbytes for each in of[:2] if each.grad is not None)
    forget(of)
    return meter.extra - gradients


def seconds(work: Callable[[], None], of: Inputs) -> float:
    forget(of)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_at(topology: Topology) -> float:
    """Return the fused loss's extra peak, in units of one local tensor of fp32 logits."""
    torch.set_num_threads(1)
    held = VOCAB // topology.tp
    of = inputs(TOKENS // (topology.tp if topology.sequence_parallel else 1), held)
    return extra(partial(fused, topology, TOKENS, VOCAB, of), of) / (4 * TOKENS * held)


def compare(topology: Topology, tokens: int, vocab: int, repeats: int) -> dict[str, Any]:
    of, logits = inputs(tokens, vocab), 4 * tokens * vocab
    works = {"fused": partial(fused, topology, tokens, vocab, of), "unfused": partial(unfused, of)}
    peaks = {name: extra(work, of) / logits for name, work in works.items()}  # also the warm-up
    times = [(seconds(works["fused"], of), seconds(works["unfused"], of)) for _ in range(repeats)]
    return {
        "tokens": tokens,
        "vocab": vocab,
        "peak_over_logits": peaks,
        "fused_seconds": median(a for a, _ in times),
        "unfused_seconds": median(b for _, b in times),
        "time_ratio": median(a / b for a, b in times),
        "time_ratio_all": [a / b for a, b in times],
    }


def main() -> None:
    torch.set_num_threads(1)
    with Pool(timeout=600) as pool:
        peaks = {name: max(pool.run(peak_at, **layout)) for name, layout in SPLIT.items()}
    topology = Topology.start()
    record(
        "distill_loss",
        hidden=HIDDEN,
        peak_over_local_logits_split=peaks,
        **compare(topology, TOKENS, VOCAB, REPEATS),
        curve=[compare(topology, tokens, vocab, 1) for tokens, vocab in CURVE],
        load=os.getloadavg()[0],
    )


if __name__ == "__main__":
    main()
