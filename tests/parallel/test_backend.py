"""megatron-core itself on gloo processes without CUDA, with the CPU backend.

Bare mcore (GPTModel, schedules, DDP, optimizer, distributed checkpoints) against itself on one process, from the same
weights: losses and gradients must not depend on the layout. Weights are drawn by name and sharded by the layout table.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.layout import Shape, lookup
from minitron_megatron.model import ModelConfig, assign, build, named_shards
from minitron_megatron.parallel import (
    FITS,
    Topology,
    final_hidden,
    load_optimizer,
    mend_distributed_optimizer,
    quieten,
    save_sharded,
)
from minitron_megatron.testing import Pool, tolerance

SHAPE = Shape(layers=4, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=128)
SMALL = SHAPE.resized(layers=3, hidden=24, ffn=32)
SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 16, 2, 4
TOKENS = SEQUENCE * MICRO_BATCH * MICRO_BATCHES

LAYOUTS = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-vp2": {"pp": 2, "vp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "dp2": {"dp": 2},
}


def test_it_says_which_megatron_it_fits() -> None:
    assert version("megatron-core") in FITS, "read parallel/*_patches.py and mcore_compat.py against the new version"


def test_a_deprecation_is_kept_back_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    quieten()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED.")
    logger.warning("the loss is not finite")
    assert [record.getMessage() for record in caplog.records] == ["the loss is not finite"]


# ---- weights and data that do not depend on the layout


def made_up(name: str, shape: Shape) -> Tensor:
    """Return the unsharded tensor of one parameter, drawn by its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    full = torch.randn(lookup(name).shape(shape.sizes()), generator=generator) * 0.15
    return full + 1 if "norm" in name else full


def cut(name: str, full: Tensor, shape: Shape, rank: int, world: int) -> Tensor:
    for dim in range(full.dim()):
        full = full.index_select(dim, lookup(name).shard_rows(dim, shape.sizes(), rank, world))
    return full


def model_of(
    shape: Shape, topology: Topology, full: Callable[[str], Tensor] | None = None, dtype: torch.dtype = torch.float32
) -> list[Any]:
    """Return this rank's chunks of mcore's GPTModel, with `full` (default: made-up) weights."""
    chunks = build(ModelConfig(shape, max_positions=SEQUENCE), topology, dtype)
    for shard in named_shards(chunks):
        weight = full(shard.name) if full else made_up(shard.name, shape)
        assign(shard, cut(shard.name, weight, shape, topology.tp_rank, topology.tp).to(dtype))
    return chunks


def batches(topology: Topology, step: int = 0) -> list[Tensor]:
    """Return this data-parallel rank's micro-batches of one global step: int64 [batch, seq] each."""
    generator = torch.Generator().manual_seed(step)
    every = torch.randint(0, SHAPE.vocab, (MICRO_BATCHES, MICRO_BATCH, SEQUENCE), generator=generator)
    return list(every)[topology.dp_rank :: topology.dp]


# ---- mcore's own training parts


def wrapped(chunks: Sequence[Any], distributed_optimizer: bool = False) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True)
    return [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]


def scheduled(step: Callable[..., Any], chunks: Sequence[Any], data: Sequence[Any], **options: Any) -> list[Any]:
    """Run micro-batches through mcore's schedule for this layout."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [iter(data) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(data),
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        **{"forward_only": False, **options},
    )


def cross_entropy(iterator: Any, chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
    tokens = next(iterator)
    out = chunk(tokens, None, None, labels=tokens.roll(-1, 1))
    return out, lambda loss: (loss.sum(), torch.tensor(loss.numel(), dtype=torch.int), loss.detach().double().sum())


def train_step(chunks: Sequence[Any], topology: Topology, step: int) -> float:
    """Accumulate the mean loss's gradients in `main_grad`; return this rank's share of the loss, in nats per token."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    return float(sum(scheduled(cross_entropy, chunks, batches(topology, step)))) / TOKENS


# ---- results of a job, and their assembly in the parent


@dataclass(frozen=True)
class Piece:
    """Gradient of one parameter on one rank."""

    name: str
    tp_rank: int
    grad: Tensor


def pieces(chunks: Sequence[Any], topology: Topology) -> list[Piece]:
    """Return every gradient of this rank's wrapped chunks."""
    shards = named_shards([chunk.module for chunk in chunks])
    return [Piece(shard.name, topology.tp_rank, shard.tensor.main_grad.clone()) for shard in shards]


def step_of(topology: Topology, shape: Shape) -> tuple[float, list[Piece]]:
    chunks = wrapped(model_of(shape, topology))
    return train_step(chunks, topology, 0), pieces(chunks, topology)


def joined(results: Sequence[list[Piece]], shape: Shape, tp: int) -> dict[str, Tensor]:
    """Return the unsharded gradients; check that ranks with the same shard agree."""
    whole: dict[str, Tensor] = {}
    for piece in (piece for result in results for piece in result):
        param, sizes = lookup(piece.name), shape.sizes()
        full = whole.setdefault(piece.name, torch.full(param.shape(sizes), torch.nan))
        rows = [param.shard_rows(dim, sizes, piece.tp_rank, tp) for dim in range(full.dim())]
        at = torch.meshgrid(*rows, indexing="ij")
        if not full[at].isnan().any():
            torch.testing.assert_close(piece.grad, full[at], **tolerance(), msg=lambda m, p=piece: f"{p.name}: {m}")
        full[at] = piece.grad
    return whole


def assert_same_step(results: Sequence[Any], truth: tuple[float, dict[str, Tensor]], shape: Shape, tp: int = 1) -> None:
    """Check the loss (whole on every tp rank of the last stage) and, relative to its size, every gradient."""
    assert sum(loss for loss, _ in results) / tp == pytest.approx(truth[0], rel=1e-6)
    grads = joined([grads for _, grads in results], shape, tp)
    assert set(grads) == set(truth[1])
    for name, want in truth[1].items():
        scale = want.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(grads[name] / scale, want / scale, **tolerance(), msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(pool: Pool) -> Callable[[Shape], tuple[float, dict[str, Tensor]]]:
    """Return a function that gives loss and gradients of a shape's first step on one process."""

    @cache
    def truth(shape: Shape) -> tuple[float, dict[str, Tensor]]:
        [(loss, grads)] = pool.run(step_of, shape)
        assert {piece.name for piece in grads} == set(shape.names())
        return loss, joined([grads], shape, 1)

    return truth


# ---- layouts


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_loss_and_gradients_do_not_depend_on_the_layout(pool: Pool, alone: Any, layout: dict[str, Any]) -> None:
    assert_same_step(pool.run(step_of, SHAPE, **layout), alone(SHAPE), SHAPE, layout.get("tp", 1))


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "vp": 2}, {"tp": 2}], ids=["pp2", "pp2-vp2", "tp2"])
def test_a_tied_embedding_gathers_the_gradients_of_both_its_homes(pool: Pool, alone: Any, layout: Any) -> None:
    tied = Shape(**{**vars(SHAPE), "tied": True})
    assert_same_step(pool.run(step_of, tied, **layout), alone(tied), tied, layout.get("tp", 1))


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "vp": 2}], ids=["pp2", "pp2-vp2"])
def test_five_layers_fit_two_pipeline_stages(pool: Pool, alone: Any, layout: Any) -> None:
    uneven = SHAPE.resized(layers=5)
    assert_same_step(pool.run(step_of, uneven, **layout), alone(uneven), uneven, layout.get("tp", 1))


# ---- two models in one step


def teach(topology: Topology) -> tuple[float, list[Piece]]:
    """Keep the final hidden states of a forward-only teacher; the student's step learns their mean over channels."""
    teacher, student = model_of(SHAPE, topology), wrapped(model_of(SMALL, topology))
    data = batches(topology)

    def hold(iterator: Any, chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        return final_hidden(chunk, next(iterator)), lambda hidden, non_loss_data: hidden

    with torch.no_grad():
        targets = scheduled(hold, teacher, data, forward_only=True, collect_non_loss_data=True)
    last = topology.is_last_stage
    assert len(targets) == len(data) * last
    assert all(target.shape == (SEQUENCE, MICRO_BATCH, SHAPE.hidden) for target in targets)

    def imitate(iterator: Any, chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        tokens, target = next(iterator)

        def loss_of(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            loss = (hidden.pow(3).mean(-1) - target.pow(3).mean(-1)).square().sum()
            return loss, torch.tensor(tokens.numel(), dtype=torch.int), loss.detach().double()

        return final_hidden(chunk, tokens), loss_of

    student[0].zero_grad_buffer()
    losses = scheduled(imitate, student, list(zip(data, targets if last else data, strict=True)))
    headless = [piece for piece in pieces(student, topology) if not piece.name.startswith("output_layer")]
    return float(sum(losses)) / TOKENS, headless


@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2}], ids=["pp2", "tp2"])
def test_a_teacher_and_a_student_of_another_shape_share_a_step(pool: Pool, layout: dict[str, int]) -> None:
    [(loss, grads)] = pool.run(teach)
    assert_same_step(pool.run(teach, **layout), (loss, joined([grads], SMALL, 1)), SMALL, layout.get("tp", 1))


# ---- resume


def trainee(topology: Topology, dtype: torch.dtype, blank: bool = False) -> tuple[list[Any], Any]:
    """Return the wrapped chunks of a model (`blank`: all zeros) and their distributed optimizer."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    mend_distributed_optimizer()
    full = (lambda name: made_up(name, SHAPE) * 0) if blank else None
    chunks = wrapped(model_of(SHAPE, topology, full, dtype), distributed_optimizer=True)
    half = dtype == torch.bfloat16
    config = OptimizerConfig(
        optimizer="adam", lr=0.01, clip_grad=1.0, use_distributed_optimizer=True, bf16=half, params_dtype=dtype
    )
    optimizer = get_megatron_optimizer(config, list(chunks))
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss
    return chunks, optimizer


def state_of(chunks: Sequence[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable"
    }  # a new dict each time: mcore adds this layout's groups
    model = chunks[0].module.sharded_state_dict(metadata=metadata)
    parts = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": parts}


def train_and_save(topology: Topology, folder: str, dtype: torch.dtype, asynchronous: bool) -> list[float]:
    """Train four steps, save after the second (asynchronously: during the third); return this rank's loss shares."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    chunks, optimizer = trainee(topology, dtype)
    writer, losses = AsyncCallsQueue(), []
    for step in range(4):
        losses.append(train_step(chunks, topology, step))
        assert optimizer.step()[0]
        if step == 1:
            state = state_of(chunks, optimizer, is_loading=False)
            request = save_sharded(state, folder, later=asynchronous)
            if asynchronous:
                writer.schedule_async_request(request)
        elif step == 2 and asynchronous:
            writer.maybe_finalize_async_calls(blocking=True)
    writer.close()
    return losses


def load_and_train(topology: Topology, folder: str, dtype: torch.dtype) -> list[float]:
    """Train the last two steps, with a model and an optimizer loaded from the checkpoint."""
    from megatron.core import dist_checkpointing

    chunks, optimizer = trainee(topology, dtype, blank=True)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part._init_optimizer_states_with_dummy_values()
    loaded = dist_checkpointing.load(state_of(chunks, optimizer, is_loading=True), folder)
    chunks[0].module.load_state_dict(loaded["model"])
    load_optimizer(optimizer, loaded["optimizer"])
    losses = []
    for step in (2, 3):
        losses.append(train_step(chunks, topology, step))
        assert optimizer.step()[0]
    return losses


def global_losses(results: Sequence[list[float]], tp: int = 1) -> list[float]:
    return [sum(shares) / tp for shares in zip(*results, strict=True)]


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("before", "after", "dtype", "asynchronous"),
    [
        pytest.param({"tp": 2}, {"tp": 2}, FP32, False, id="tp2"),
        pytest.param({"tp": 2}, {"pp": 2}, FP32, False, id="tp2-to-pp2"),
        pytest.param({"tp": 1}, {"tp": 2}, FP32, False, id="tp1-to-tp2"),
        pytest.param({"pp": 2}, {"dp": 2}, FP32, False, id="pp2-to-dp2"),
        pytest.param({"tp": 2}, {"tp": 2}, FP32, True, id="tp2-async"),
        pytest.param({"tp": 2}, {"pp": 2}, FP32, True, id="tp2-to-pp2-async"),
        pytest.param({"dp": 2}, {"dp": 2}, BF16, False, id="dp2-bf16"),
    ],
)
def test_a_resume_goes_on_as_if_never_broken(
    pool: Pool, tmp_path: Path, before: dict[str, int], after: dict[str, int], dtype: torch.dtype, asynchronous: bool
) -> None:
    saved = pool.run(train_and_save, str(tmp_path), dtype, asynchronous, **before)
    resumed = pool.run(load_and_train, str(tmp_path), dtype, **after)
    if before == after:
        assert resumed == [losses[2:] for losses in saved]
    unbroken = global_losses(saved, before.get("tp", 1))
    assert abs(unbroken[3] - unbroken[2]) > 1e-3  # a step changes the loss
    assert global_losses(resumed, after.get("tp", 1)) == pytest.approx(unbroken[2:], rel=1e-5)


# ---- transformers


ODD_VOCAB = Shape(layers=2, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=509)


def llama() -> Any:
    """Return transformers' Llama in the shape of ODD_VOCAB, with large random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = ODD_VOCAB
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_groups,
            head_dim=shape.head_dim,
            rms_norm_eps=1e-5,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )
    return model.eval()


def megatron_names(hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Llama's weights, fused and padded by hand as in Megatron-Core."""
    shape = ODD_VOCAB
    padding = torch.zeros(shape.padded_vocab - shape.vocab, shape.hidden)
    full = {
        "embedding.word_embeddings.weight": torch.cat([hf["model.embed_tokens.weight"], padding]),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": torch.cat([hf["lm_head.weight"], padding]),
    }
    for layer in range(shape.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        q, k, v = (
            hf[f"{theirs}self_attn.{each}_proj.weight"].view(shape.kv_groups, -1, shape.head_dim, shape.hidden)
            for each in "qkv"
        )
        gate_up = [hf[f"{theirs}mlp.{each}_proj.weight"] for each in ("gate", "up")]
        full |= {
            ours + "self_attention.linear_qkv.weight": torch.cat([q, k, v], dim=1).reshape(-1, shape.hidden),
            ours + "self_attention.linear_proj.weight": hf[theirs + "self_attn.o_proj.weight"],
            ours + "mlp.linear_fc1.weight": torch.cat(gate_up),
            ours + "mlp.linear_fc2.weight": hf[theirs + "mlp.down_proj.weight"],
            ours + "input_layernorm.weight": hf[theirs + "input_layernorm.weight"],
            ours + "pre_mlp_layernorm.weight": hf[theirs + "post_attention_layernorm.weight"],
        }
    return full


def logits_of(topology: Topology, full: dict[str, Tensor], tokens: Tensor) -> Tensor:
    [chunk] = model_of(ODD_VOCAB, topology, full.__getitem__)
    with torch.no_grad():
        return chunk(tokens, None, None)


@pytest.mark.parametrize(
    "layout", [{"tp": 1}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}], ids=["tp1", "tp2", "tp2-sp"]
)
def test_logits_equal_transformers_llama_at_an_odd_vocabulary(pool: Pool, layout: dict[str, Any]) -> None:
    model = llama()
    tokens = torch.randint(0, ODD_VOCAB.vocab, (MICRO_BATCH, SEQUENCE), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want = model(tokens).logits
    full = megatron_names({name: weight.detach().clone() for name, weight in model.named_parameters()})
    got = torch.cat(pool.run(logits_of, full, tokens, **layout), dim=-1)
    assert got.shape[-1] == 512 and ODD_VOCAB.padded_vocab == 512
    assert not got[..., 509:].any()
    torch.testing.assert_close(got[..., :509] / want.abs().max(), want / want.abs().max(), **tolerance())
