"""The fused losses against logits in float64: value and gradients, wherever the vocabulary and the sequence are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.losses import chunk_tokens, distill_loss, lm_loss
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import LivePeak, Pool, tolerance

SEQUENCE, BATCH, HIDDEN, TEACHER_HIDDEN, ROWS = 12, 3, 10, 14, 64

LAYOUTS = [
    pytest.param({"tp": 1}, id="tp1"),
    pytest.param({"tp": 2}, id="tp2"),
    pytest.param({"tp": 2, "sequence_parallel": True}, id="tp2-sp"),
]


@dataclass(frozen=True)
class Case:
    loss: str = "lm"
    vocab: int = 50
    """Of ROWS rows; the rest are padding, filled with numbers that would be noticed."""
    counted: float = 0.7
    """The share of the tokens whose mask is true."""
    temperature: float = 1.0
    chunk: int | None = 5
    upstream: float = 1.0
    """The gradient of the loss."""
    spread: float = 1.0
    """Of the hidden states."""
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Data:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    mask: Tensor

    def to(self, dtype: torch.dtype) -> Data:
        floats = ("hidden", "weight", "teacher_hidden", "teacher_weight")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in floats})


def make_data(case: Case) -> Data:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.rand(BATCH, SEQUENCE, generator=generator) < case.counted
    labels = torch.randint(0, case.vocab, (BATCH, SEQUENCE), generator=generator)
    data = Data(
        hidden=normal(SEQUENCE, BATCH, HIDDEN) * case.spread,
        weight=normal(ROWS, HIDDEN),
        teacher_hidden=normal(SEQUENCE, BATCH, TEACHER_HIDDEN) * case.spread,
        teacher_weight=normal(ROWS, TEACHER_HIDDEN),
        labels=torch.where(mask, labels, -100),
        mask=mask,
    )
    data.weight[case.vocab :] = data.teacher_weight[case.vocab :] = 9.0
    return data.to(case.dtype)


def truth(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of the hidden states, gradient of the output weight), in float64, with every logit at once."""
    data = make_data(case).to(torch.float64)
    hidden, weight = data.hidden.requires_grad_(), data.weight.requires_grad_()
    counted = data.mask.t()  # as the hidden states lie: [s, b]
    log_p = (hidden[counted] @ weight[: case.vocab].t() / case.temperature).log_softmax(-1)
    if case.loss == "lm":
        loss = -log_p.gather(-1, data.labels.t()[counted].unsqueeze(-1)).sum()
    else:
        teacher = data.teacher_hidden[counted] @ data.teacher_weight[: case.vocab].t() / case.temperature
        log_t = teacher.log_softmax(-1)
        loss = (log_t.exp() * (log_t - log_p)).sum()
    (loss * case.upstream).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def cut(tensor: Tensor, rank: int, world: int) -> Tensor:
    return tensor.chunk(world)[rank].clone()


def fused(topology: Topology, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's (loss, its parts of both gradients, loss without gradients)."""
    data, rank, tp = make_data(case), topology.tp_rank, topology.tp
    over_sequence = tp if topology.sequence_parallel else 1
    place = rank if topology.sequence_parallel else 0
    hidden = cut(data.hidden, place, over_sequence).requires_grad_()
    weight = cut(data.weight, rank, tp).requires_grad_()
    options: dict[str, Any] = {
        "vocab": case.vocab,
        "group": topology.tp_group,
        "sequence_parallel": topology.sequence_parallel,
        "chunk": case.chunk,
    }

    def loss() -> Tensor:
        if case.loss == "lm":
            return lm_loss(hidden, weight, data.labels, data.mask, **options)
        teacher = cut(data.teacher_hidden, place, over_sequence), cut(data.teacher_weight, rank, tp)
        return distill_loss(hidden, weight, *teacher, data.mask, temperature=case.temperature, **options)

    value = loss()
    (value * case.upstream).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert (value.dtype, value.shape) == (torch.float32, ())
    assert (hidden.grad.dtype, weight.grad.dtype) == (case.dtype, case.dtype)
    with torch.no_grad():
        return value.detach(), hidden.grad, weight.grad, loss()


def assert_close(got: Tensor, want: Tensor, relative: float) -> None:
    """Every element within `relative` of the largest."""
    assert torch.isfinite(got).all()
    assert (got.double() - want).abs().max() <= relative * want.abs().max()


def assert_fused_equals_truth(pool: Pool, case: Case, layout: dict[str, Any], relative: float) -> None:
    want, want_hidden, want_weight = truth(case)
    values, hidden, weight, without = zip(*pool.run(fused, case, **layout), strict=True)
    assert all(torch.equal(value, values[0]) for value in (*values, *without))
    assert_close(values[0], want, relative)
    assert_close(torch.cat(weight), want_weight, relative)
    for part in [torch.cat(hidden)] if "sequence_parallel" in layout else hidden:
        assert_close(part, want_hidden, relative)
    assert not torch.cat(weight)[case.vocab :].any()


CASES = {
    "some tokens": {},
    "every token": {"counted": 1.0},
    "one token": {"counted": 0.03},
    "no padding": {"vocab": 64},
    "a rank with nothing but padding": {"vocab": 30},
    "one chunk": {"chunk": 1000},
    "chunks that divide": {"counted": 1.0, "chunk": 9},
    "chunks of one": {"chunk": 1},
    "the chunk it chooses": {"chunk": None},
    "a scaled gradient": {"upstream": 0.37},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_value_and_gradients_equal_the_unfused_truth(pool: Pool, loss: str, case: str, layout: dict[str, Any]) -> None:
    assert_fused_equals_truth(pool, Case(loss, **CASES[case]), layout, tolerance()["rtol"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_divides_both_logits_and_nothing_else(
    pool: Pool, temperature: float, layout: dict[str, Any]
) -> None:
    case = Case("kl", temperature=temperature, upstream=2.5)
    assert_fused_equals_truth(pool, case, layout, tolerance()["rtol"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_bf16_is_as_near_as_bf16_can_be(pool: Pool, loss: str, layout: dict[str, Any]) -> None:
    case = Case(loss, dtype=torch.bfloat16)
    assert_fused_equals_truth(pool, case, layout, tolerance(torch.bfloat16)["rtol"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_logits_in_the_hundreds_overflow_nowhere(pool: Pool, loss: str, layout: dict[str, Any]) -> None:
    assert_fused_equals_truth(pool, Case(loss, spread=100.0), layout, 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_no_counted_token_is_a_loss_of_zero(pool: Pool, loss: str, layout: dict[str, Any]) -> None:
    for value, hidden, weight, without in pool.run(fused, Case(loss, counted=0.0), **layout):
        assert value == without == 0
        assert not hidden.any() and not weight.any()


def against_itself(topology: Topology) -> tuple[Tensor, Tensor]:
    data = make_data(Case())
    hidden, weight = data.hidden.requires_grad_(), data.weight.requires_grad_()
    loss = distill_loss(hidden, weight, data.hidden, data.weight, data.mask, vocab=50, group=topology.tp_group)
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


def test_a_model_does_not_differ_from_itself(pool: Pool) -> None:
    [(loss, gradient)] = pool.run(against_itself)
    assert abs(loss) < 1e-5 and gradient.abs().max() < 1e-5


def twice(topology: Topology) -> None:
    data = make_data(Case())
    hidden = data.hidden.requires_grad_()
    loss = lm_loss(hidden, data.weight, data.labels, data.mask, vocab=50, group=topology.tp_group)
    (loss * 2).backward(retain_graph=True)
    loss.backward()


def test_a_second_backward_is_refused_rather_than_wrong(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pool.run(twice)


# ---- memory

TOKENS, VOCAB, WIDTH = 1024, 8192, 64
ONE_LOGITS = 4 * TOKENS * VOCAB


def extra_peak(topology: Topology, loss: str, chunk: int) -> int:
    """Bytes by which the live tensors rose during a loss and its backward."""
    held = VOCAB // topology.tp
    hidden, teacher_hidden = torch.randn(TOKENS, 1, WIDTH, requires_grad=True), torch.randn(TOKENS, 1, WIDTH)
    weight, teacher_weight = torch.randn(held, WIDTH, requires_grad=True), torch.randn(held, WIDTH)
    labels, mask = torch.randint(0, VOCAB, (1, TOKENS)), torch.ones(1, TOKENS, dtype=torch.bool)
    options: dict[str, Any] = {"vocab": VOCAB, "group": topology.tp_group, "chunk": chunk}
    with LivePeak() as meter:
        if loss == "lm":
            lm_loss(hidden, weight, labels, mask, **options).backward()
        elif loss == "kl":
            distill_loss(hidden, weight, teacher_hidden, teacher_weight, mask, **options).backward()
        else:
            logits = hidden.flatten(0, 1) @ weight.t()
            torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
    return meter.extra


@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_full_logits_never_exist(pool: Pool, loss: str) -> None:
    assert pool.run(extra_peak, "unfused", 0)[0] > 2 * ONE_LOGITS, "the meter sees logits where they exist"
    [few] = pool.run(extra_peak, loss, 32)
    [more] = pool.run(extra_peak, loss, 64)
    assert few < ONE_LOGITS / 4
    assert 0 < more - few <= 3 * 4 * 32 * VOCAB * 1.1


@pytest.mark.parametrize("held", [1000, 128256, 16032, 0])
def test_the_chosen_chunk_keeps_within_its_budget(held: int) -> None:
    chunk = chunk_tokens(held, budget_bytes=2**26)
    assert chunk == 16 or 3 * 4 * chunk * held <= 2**26 < 3 * 4 * (chunk + 1) * max(held, 1)
