"""A GPU gives the CPU's numbers, in fp32 and within rounding in bf16, and keeps the memory bounds.

The same jobs run on workers that see GPUs and on workers that see none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.convert import load_hf
from minitron_megatron.distill import KDObjective
from minitron_megatron.losses import DIVERGENCES, KDLoss, Output, Vocabulary, distill_loss
from minitron_megatron.model import Spec, forward_only
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose, trim
from minitron_megatron.score import score
from minitron_megatron.testing import Pool, tolerance
from minitron_megatron.train import train
from tests.distill.test_objective import BATCH, TRAINING, Job, distil
from tests.losses.cases import Case, make_data, truth
from tests.model.test_checkpoint import load, save
from tests.run.test_run import table, work
from tests.tiny import SHAPE, samples, share

RELATIVE = 1e-4
"""Tolerance in fp32: GPU kernels add in another order than the CPU's, over five layers and five steps."""


def assert_close(got: Tensor, want: Tensor, relative: float = RELATIVE) -> None:
    """Assert that every element differs by at most `relative` times the largest."""
    assert torch.isfinite(got).all()
    assert (got.double() - want.double()).abs().max() <= relative * want.double().abs().max()


# ---- score, choose, trim


def pruned(topology: Topology, folder: Path) -> tuple[Any, Any, list[Tensor]]:
    """Return (scores, kept indices, final hidden states of the pruned model)."""
    model, batches = load_hf(folder, topology), share(samples(8), topology)
    scores = score(model, batches, topology=topology)
    plan = choose(scores, hidden=32, ffn=40, heads=4)
    hidden = [each.cpu() for each in forward_only(trim(model, plan, topology), batches)]
    return scores.values, plan.keep, hidden


def test_scores_choice_and_cut_are_the_cpus(pool: Pool, gpus: Pool, checkpoints: dict[str, Path]) -> None:
    [(scores, keep, hidden)] = pool.run(pruned, checkpoints["untied"])
    [(gpu_scores, gpu_keep, gpu_hidden)] = gpus.run(pruned, checkpoints["untied"])
    for axis, layers in scores.items():
        for layer, units in layers.items():
            assert_close(gpu_scores[axis][layer], units)
    assert gpu_keep == keep
    for got, want in zip(gpu_hidden, hidden, strict=True):
        assert_close(got, want)


# ---- distillation


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"window": 1, "offload": True}])
def test_distillation_is_the_cpus(
    pool: Pool, gpus: Pool, checkpoints: dict[str, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(checkpoints["untied"], checkpoints["student"], tmp_path / "student", options=options)
    [want], [got] = pool.run(distil, job), gpus.run(distil, replace(job, out=tmp_path / "of_gpu"))
    for key in ("loss", "grad_norm"):
        assert [s[key] for s in got.curve] == pytest.approx([s[key] for s in want.curve], rel=RELATIVE), key
    assert got.held_out == pytest.approx(want.held_out, rel=RELATIVE)
    assert got.teacher_hash == want.teacher_hash and got.teacher_is_frozen


def curve_of(
    topology: Topology, teacher: Path, student: Path, dtype: torch.dtype, spec: Spec = "local"
) -> list[dict[str, float]]:
    curve: list[dict[str, float]] = []
    objective = KDObjective(load_hf(teacher, topology, dtype, spec=spec), topology, vocab=SHAPE.vocab)
    train(
        load_hf(student, topology, dtype, spec=spec),
        objective,
        lambda step: share(samples(BATCH, seed=step), topology),
        TRAINING,
        topology,
        listener=lambda event: curve.append(dict(event.values)),
    )
    return curve


def test_bf16_is_near_fp32(gpus: Pool, checkpoints: dict[str, Path]) -> None:
    models = checkpoints["untied"], checkpoints["student"]
    [exact], [half] = (gpus.run(curve_of, *models, dtype) for dtype in (torch.float32, torch.bfloat16))
    for want, got in zip(exact, half, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=0.05)
        assert 0 < got["grad_norm"] < float("inf")
    assert half[-1]["loss"] < half[0]["loss"]


@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"dp": 2}, {"dp": 2, "cp": 2}]
)
def test_nccl_gives_what_one_gpu_gives(
    two_gpus: Pool, checkpoints: dict[str, Path], layout: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(checkpoints["untied"], checkpoints["student"], tmp_path / "student")
    [want] = two_gpus.run(distil, job)
    for got in two_gpus.run(distil, replace(job, out=tmp_path / "of_two"), **layout):
        for key in ("loss", "grad_norm"):
            assert [s[key] for s in got.curve] == pytest.approx([s[key] for s in want.curve], rel=RELATIVE), key


# ---- memory


def weighed(topology: Topology, teacher: Path, offload: bool) -> tuple[int, int, int]:
    """Return the bytes on the GPU (before and after the teacher has run), and those of its weights to offload."""
    before = torch.cuda.memory_allocated()
    model = load_hf(teacher, topology)
    leaves = sum(p.nbytes for chunk in model for name, p in chunk.named_parameters() if "output_layer" not in name)
    objective = KDObjective(model, topology, vocab=SHAPE.vocab, offload=offload)
    held = torch.cuda.memory_allocated() - before
    objective.prepare(share(samples(2), topology))
    objective._hidden = []
    return held, torch.cuda.memory_allocated() - before, leaves


def test_an_offloaded_teacher_leaves_the_gpu(gpus: Pool, checkpoints: dict[str, Path]) -> None:
    [(kept, _, leaves)] = gpus.run(weighed, checkpoints["untied"], False)
    [(held, after, _)] = gpus.run(weighed, checkpoints["untied"], True)
    assert kept >= leaves
    assert kept - held >= leaves
    assert kept - after >= 0.9 * leaves  # allocations are rounded up to 512 bytes


def loss_peak(topology: Topology, kd: KDLoss) -> float:
    """Return the peak memory of the fused loss and its backward beyond the gradients, in units of the student's fp32
    logits."""
    tokens, vocab, width = 8192, 32768, 64
    device = topology.device
    hidden, teacher_hidden = (torch.randn(tokens, 1, width, device=device) for _ in range(2))
    weight, teacher_weight = (torch.randn(vocab, width, device=device) for _ in range(2))
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
    labels = torch.randint(0, vocab, (1, tokens), device=device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step() -> int:
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        distill_loss(
            Output(hidden, weight),
            Output(teacher_hidden, teacher_weight),
            mask,
            Vocabulary(vocab, topology.tp_group),
            loss=kd,
            labels=labels,
        ).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    step()  # cuBLAS allocates its workspace once
    return (step() - hidden.nbytes - weight.nbytes) / (4 * tokens * vocab)


@pytest.mark.parametrize("kd", [*map(KDLoss, DIVERGENCES), KDLoss(ce_weight=0.5), KDLoss(top_k=50)], ids=str)
def test_the_loss_holds_at_most_a_quarter_of_the_logits(gpus: Pool, kd: KDLoss) -> None:
    [found] = gpus.run(loss_peak, kd)
    assert 0 < found <= 1 / 4


# ---- kernels


def fused_on_gpu(topology: Topology, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient of the hidden states, gradient of the output weight)."""
    data = make_data(case)
    parts = {name: tensor.to(topology.device) for name, tensor in vars(data).items()}
    hidden, weight = parts["hidden"].requires_grad_(), parts["weight"].requires_grad_()
    loss = distill_loss(
        Output(hidden, weight),
        Output(parts["teacher_hidden"], parts["teacher_weight"]),
        parts["mask"],
        Vocabulary(case.vocab, topology.tp_group),
        loss=case.loss or KDLoss(),
        labels=parts["labels"],
        chunk=case.chunk,
    )
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach().cpu(), hidden.grad.cpu(), weight.grad.cpu()


@pytest.mark.parametrize("kd", [*map(KDLoss, DIVERGENCES), KDLoss(ce_weight=0.5), KDLoss(top_k=20)], ids=str)
def test_the_fused_loss_is_the_naive_one(gpus: Pool, kd: KDLoss) -> None:
    case = Case(kd)
    for got, want in zip(gpus.run(fused_on_gpu, case)[0], truth(case), strict=True):
        assert_close(got, want)


def attended(topology: Topology, dtype: torch.dtype, kernel: str) -> tuple[Tensor, Tensor]:
    """Return (our core attention, which must use this kernel; plain softmax attention in fp64)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from minitron_megatron.model.spec import CoreAttention

    draw = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(64, 2, heads, 32, generator=draw).to(dtype) for heads in (8, 2, 2))
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        core = CoreAttention(SimpleNamespace(window_size=None))
        got = core(*(x.to(topology.device) for x in (q, k, v)), None).cpu()
    wide = [x.double().permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(4, 2), v.repeat_interleave(4, 2))]
    weights = wide[0] @ wide[1].transpose(-1, -2) / 32**0.5
    weights = weights.masked_fill(torch.ones(64, 64).triu(1).bool(), float("-inf"))
    return got, (weights.softmax(-1) @ wide[2]).permute(2, 0, 1, 3).reshape(64, 2, -1)


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (torch.bfloat16, "FLASH_ATTENTION"),
        (torch.bfloat16, "CUDNN_ATTENTION"),
        (torch.float32, "EFFICIENT_ATTENTION"),
    ],
    ids=str,
)
def test_attention_holds_no_square_of_the_sequence(gpus: Pool, dtype: torch.dtype, kernel: str) -> None:
    [(got, want)] = gpus.run(attended, dtype, kernel)
    torch.testing.assert_close(got.double(), want, **tolerance(dtype))


# ---- checkpoints and runs


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_checkpoint_gives_back_what_was_saved(gpus: Pool, tmp_path: Path, asynchronous: bool) -> None:
    [held] = gpus.run(save, tmp_path, [1], ("",), {}, asynchronous)
    [(state, [loaded])] = gpus.run(load, tmp_path / "step_00000001")
    assert state["step"] == 1
    assert all(torch.equal(loaded[name].cpu(), tensor.cpu()) for name, tensor in held[0].items())


def test_a_checkpoint_of_a_gpu_loads_on_a_cpu(pool: Pool, gpus: Pool, tmp_path: Path) -> None:
    [held] = gpus.run(save, tmp_path, [1])
    [(_, [loaded])] = pool.run(load, tmp_path / "step_00000001")
    assert all(torch.equal(loaded[name], tensor.cpu()) for name, tensor in held[0].items())


def test_a_whole_recipe_gives_the_cpus_table(
    pool: Pool, gpus: Pool, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    tables = []
    for where, workers in {"cpu": pool, "gpu": gpus}.items():
        recipe = recipe_file(f"{where}.yaml", out=str(tmp_path / where))
        workers.run(work, recipe, timeout=600)
        tables.append(table(recipe))
    for want, got in zip(*tables, strict=True):
        for key, value in want.items():
            assert got[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), key


def last_of(topology: Topology, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Return the attention of the last eight of 24 positions, and its gradients."""
    from minitron_megatron.model.spec import _last

    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 8, 64), (2, 2, 24, 64), (2, 2, 24, 64))
    parts = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    out = _last(*parts)
    out.square().sum().backward()
    return tuple(each.float().cpu() for each in (out.detach(), *(part.grad for part in parts if part.grad is not None)))


BF16, FP32 = {"rtol": 0.05, "atol": 0.1}, {"rtol": 1e-3, "atol": 1e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_a_part_of_a_sequence(gpus: Pool, dtype: torch.dtype) -> None:
    [want], [got] = (gpus.run(last_of, each, device) for each, device in ((torch.float32, "cpu"), (dtype, "cuda")))
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected, **(BF16 if dtype == torch.bfloat16 else FP32))


# ---- Transformer Engine


def need_engine(topology: Topology) -> None:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        pytest.skip("Transformer Engine is not installed")


def hidden_of(topology: Topology, folder: Path, spec: Spec) -> Tensor:
    need_engine(topology)
    return forward_only(load_hf(folder, topology, spec=spec), share(samples(2), topology))[0].cpu()


def test_transformer_engines_layers_compute_the_same(gpus: Pool, checkpoints: dict[str, Path]) -> None:
    [want], [got] = (gpus.run(hidden_of, checkpoints["untied"], spec) for spec in ("local", "te"))
    assert_close(got, want)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}], ids=["tp1", "tp2-sp"])
def test_transformer_engines_layers_learn_the_same(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], layout: dict[str, Any]
) -> None:
    workers: Pool = request.getfixturevalue("two_gpus" if layout else "gpus")
    workers.run(need_engine)
    models = checkpoints["untied"], checkpoints["student"]
    [want] = workers.run(curve_of, *models, torch.float32, "local")
    for got in workers.run(curve_of, *models, torch.float32, "te", **layout):
        for key in ("loss", "grad_norm"):
            assert [s[key] for s in got] == pytest.approx([s[key] for s in want], rel=RELATIVE), key


def test_the_gpu_benchmark_runs_at_toy_size() -> None:
    from tests.benchmarks.test_gpu_distill import test_it_measures_both_students_with_both_losses as measures

    measures()
