"""`write WORK`: write a checkpoint of every family for Megatron-LM, and transformers' logits of its source.
`read WORK`: load it by Megatron-LM's own argument parser, model builder and loader with the flags in its folder, on a
CPU with the local spec, and compare the logits.

MEGATRON_LM: path of Megatron-LM's source. Its GPU dependencies are replaced: CUDA by the CPU, apex's norm by ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(2, 42).view(2, 20)
TOLERANCE = 1e-4
"""Tolerance relative to the largest logit."""
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
OTHER = {
    "llama": {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "rms_norm_eps": 1e-3},
    "mistral": {"sliding_window": 8},
    "qwen3_moe": {"rms_norm_eps": 1e-3},
}
"""Settings that Megatron-LM can express, instead of those of the tests' folders."""
RUN = [
    "--transformer-impl", "local", "--distributed-backend", "gloo", "--use-cpu-initialization",
    "--tokenizer-type", "NullTokenizer", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4",
    "--no-gradient-accumulation-fusion", "--no-persist-layer-norm", "--no-masked-softmax-fusion", "--no-rope-fusion",
    "--no-bias-swiglu-fusion", "--no-bias-gelu-fusion",
]  # fmt: skip
"""Flags of a run that the user chooses; they do not describe the model."""


def write(work: Path) -> None:
    from minitron_megatron.convert import load_hf
    from minitron_megatron.model import save_megatron_lm
    from minitron_megatron.parallel import Topology
    from tests.compat.logits import logits
    from tests.convert.conftest import KINDS, make_folder

    topology = Topology.start()
    for kind in KINDS:
        source = make_folder(work / "source" / kind, kind, **OTHER.get(kind, {}))
        save_megatron_lm(load_hf(source, topology), work / "megatron" / kind, topology)
        save_file({"logits": logits(source)}, work / f"{kind}.safetensors")
        print(kind, flush=True)


def flags_of(folder: Path) -> list[str]:
    script = f'source "{folder}/megatron-args.sh"; printf "%s\\n" "${{MEGATRON_ARGS[@]}}"'
    return subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout.splitlines()


def read(work: Path) -> None:
    from minitron_megatron.model.spec import Norm
    from minitron_megatron.parallel import Topology

    Topology.start()
    from megatron.core import num_microbatches_calculator, package_info
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    if not package_info.__file__.startswith(os.environ["MEGATRON_LM"]):
        raise SystemExit(f"megatron.core is that of {package_info.__file__}, and not Megatron-LM's own")
    WrappedTorchNorm.__new__ = lambda kind, config, hidden_size, eps=1e-5, **_: Norm(config, hidden_size, eps)
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 1, 1, 1, False)
    worst = 0.0
    for folder in sorted((work / "megatron").iterdir()):
        mine, theirs = loaded(folder), load_file(work / f"{folder.name}.safetensors")["logits"]
        apart = float((mine[..., : theirs.shape[-1]] - theirs).abs().max() / theirs.abs().max())
        worst = max(worst, apart) if apart == apart else float("inf")
        print(
            f"Megatron-LM (mcore {package_info.__version__})  {folder.name:<14} differs by {apart:.1e}", file=sys.stderr
        )
    if worst > TOLERANCE:
        raise SystemExit(f"the largest difference is {worst:.1e} of the largest logit, more than {TOLERANCE}")


def loaded(folder: Path) -> torch.Tensor:
    """Return the logits of the model that Megatron-LM builds and loads with the folder's flags."""
    from megatron.training import arguments, checkpointing, global_vars

    sys.argv = ["pretrain_gpt.py", *RUN, *flags_of(folder)]
    args = arguments.parse_args()
    checkpointing.load_args_from_checkpoint(args)
    arguments.validate_args(args)
    global_vars.set_args(args)
    from gpt_builders import gpt_builder

    model = gpt_builder(args, pre_process=True, post_process=True)
    for weight in model.parameters():
        weight.data.fill_(torch.nan)
    checkpointing.load_checkpoint([model], None, None, strict=True)
    return logits_of(model.eval())


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    length = TOKENS.shape[1]
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return model(TOKENS, torch.arange(length).expand_as(TOKENS), hidden).float()


def main() -> None:
    sys.path[:0] = [str(ROOT)]
    verb, work = sys.argv[1:]
    if "MEGATRON_LM" not in os.environ:
        print("skipped: MEGATRON_LM names no source of Megatron-LM")
    elif verb == "write":
        write(Path(work))
    else:
        sys.path.insert(0, os.environ["MEGATRON_LM"])
        read(Path(work))


if __name__ == "__main__":
    main()
