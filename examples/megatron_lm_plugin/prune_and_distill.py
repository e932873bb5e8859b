"""A training script like Megatron-LM's, whose GPTModel is pruned and distilled by ten calls of this package.

    torchrun --nproc-per-node 2 examples/megatron_lm_plugin/prune_and_distill.py --tensor-model-parallel-size 2

Only the part between the two rulers is added; the rest is usual: parallel state, `model_provider`, batches,
`forward_step`, mcore's schedule, DDP and optimizer. It trains a small byte-level teacher on the text of Python's
standard library, prunes it to half and distils. Runs on CPUs (gloo) and GPUs (NCCL).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from minitron_megatron.data import Batch
from minitron_megatron.layout import parameters
from minitron_megatron.losses import Output, Vocabulary, distill_loss, lm_loss
from minitron_megatron.model import forward_only, output_weight
from minitron_megatron.parallel import Topology, final_hidden, install_cpu_backend
from minitron_megatron.prune import choose, trim
from minitron_megatron.score import score

install_cpu_backend()  # before importing mcore; it does nothing if CUDA is available

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

VOCAB = 256
"""Number of byte values."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prune and distil a GPTModel that this script builds.")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--ffn-hidden-size", type=int, default=256)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    parser.add_argument("--num-query-groups", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--num-microbatches", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--train-iters", type=int, default=60)
    parser.add_argument("--distill-iters", type=int, default=30)
    return parser.parse_args()


def initialize_megatron(args: argparse.Namespace) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)


def model_provider(args: argparse.Namespace) -> GPTModel:
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    return model.to(torch.cuda.current_device()) if torch.cuda.is_available() else model


def batches(args: argparse.Namespace) -> Iterator[Batch]:
    """Yield random windows of the standard library's source, different on each data-parallel rank."""
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    while True:
        starts = torch.randint(len(data) - args.seq_length - 1, (args.micro_batch_size,), generator=generator)
        rows = torch.stack([data[start : start + args.seq_length + 1] for start in starts.tolist()]).to(device)
        yield Batch(rows[:, :-1], rows[:, 1:], torch.ones_like(rows[:, 1:], dtype=torch.bool))


def pretrain_step(iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(iterator)
    gpt = model.module

    def loss_func(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        vocabulary = Vocabulary(VOCAB, parallel_state.get_tensor_model_parallel_group())
        loss = lm_loss(Output(hidden, output_weight(gpt)), batch.labels, batch.mask, vocabulary)
        return loss, batch.mask.sum().int(), {"loss": loss.detach() / batch.mask.sum()}

    return final_hidden(gpt, batch.tokens), loss_func


def train(model: GPTModel, forward_step: Any, iterator_of: Any, iters: int, args: argparse.Namespace) -> list[float]:
    """Run Megatron's training loop; return the loss of each iteration (zeros before the last pipeline stage)."""
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=args.lr), [wrapped])
    model.config.finalize_model_grads_func = finalize_model_grads
    curve = []
    for _ in range(iters):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterator_of(),
            model=wrapped,
            num_microbatches=args.num_microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        curve.append(float(sum(each["loss"] for each in losses) / len(losses)) if losses else 0.0)
    return curve


def main() -> None:
    args = parse()
    initialize_megatron(args)
    data, teacher = batches(args), model_provider(args)
    pretrained = train(teacher, pretrain_step, lambda: data, args.train_iters, args)

    # ------------------------------------------------------------------------------------------ this package's calls
    topology = Topology.running()
    student = model_provider(args)
    student.load_state_dict(teacher.state_dict())
    scores = score(student, [next(data) for _ in range(8)], topology=topology)
    sizes = {
        "hidden": args.hidden_size * 3 // 4,
        "ffn": args.ffn_hidden_size // 2,
        "heads": args.num_attention_heads // 2,
    }
    plan = choose(scores, **sizes)
    [student] = trim(student, plan, topology)
    teacher.requires_grad_(False)

    def with_teacher() -> Iterator[tuple[Batch, torch.Tensor | None]]:
        step = [next(data) for _ in range(args.num_microbatches)]
        hidden = forward_only(teacher, step)
        return iter([(batch, hidden[i] if hidden else None) for i, batch in enumerate(step)])

    def distill_step(iterator: Iterator[tuple[Batch, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
        batch, taught = next(iterator)
        return final_hidden(model.module, batch.tokens), partial(loss_func, model.module, batch, taught)

    def loss_func(gpt: Any, batch: Batch, taught: torch.Tensor, hidden: torch.Tensor) -> tuple[Any, ...]:
        models = Output(hidden, output_weight(gpt)), Output(taught, output_weight(teacher))
        kl = distill_loss(*models, batch.mask, Vocabulary(VOCAB, topology.tp_group))
        return kl, batch.mask.sum().int(), {"loss": kl.detach() / batch.mask.sum()}

    # -----------------------------------------------------------------------------------------------------------------
    distilled = train(student, distill_step, with_teacher, args.distill_iters, args)
    if dist.get_rank() == dist.get_world_size() - 1:  # of the last pipeline stage
        margin = min(min(by_layer.values()) for by_layer in plan.margins.values())
        print(f"teacher: loss {pretrained[0]:.3f} -> {pretrained[-1]:.3f} nats per byte")
        print(
            f"pruned: {parameters(plan.shape):,} -> {parameters(plan.target):,} parameters; "
            f"smallest margin {margin:.1e}"
        )
        print(f"distilled: KL {distilled[0]:.3f} -> {distilled[-1]:.3f} nats per byte", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
