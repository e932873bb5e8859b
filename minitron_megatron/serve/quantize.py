"""FP8 quantisation of a Hugging Face folder by nvidia-modelopt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..convert import carry, read_config, transformers_model
from ..errors import CheckpointError, PlanError
from ..files import read_json, whole_folder, write_json
from ..layout import Shape

__all__ = ["check_fp8", "quantize_fp8"]

MULTIPLE = 16
"""Every dim of an FP8 matrix multiplication must be a multiple of this."""
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets for its processes."""
QUANTISATION_KEY = "quantization_config"
CARD = "README.md"


def check_fp8(shape: Shape) -> None:
    """Raise PlanError if a dim is not a multiple of 16, which FP8 needs."""
    dims = {"hidden": shape.hidden, "ffn": shape.ffn, "expert_ffn": shape.expert_ffn, "shared_ffn": shape.shared_ffn}
    dims |= {"heads x head_dim": shape.heads * shape.head_dim, "kv_groups x head_dim": shape.kv_groups * shape.head_dim}
    for name, size in dims.items():
        if size % MULTIPLE:
            below = size // MULTIPLE * MULTIPLE
            raise PlanError(
                f"FP8 needs multiples of {MULTIPLE}, but {name} is {size}. "
                f"Prune to {below} or {below + MULTIPLE}, or do not quantise."
            )


def quantize_fp8(source: Path, folder: Path, samples: Sequence[Tensor], *, kv_cache: bool = False) -> None:
    """Quantise a folder after training: weights and inputs of the layers' matrices in e4m3, with a scale each.

    Scales are calibrated on `samples` (token ids, int64 [batch, seq]), on one GPU if there is one. Embedding, output
    layer and norms keep their dtype. kv_cache: quantise the KV cache too. The config keeps the source's flat layout,
    which every reader understands. modelopt runs in a process of its own, because it reduces scales over all ranks of
    the process group it finds. Raises CheckpointError if that process fails.
    """
    check_fp8(read_config(source).shape)
    alone = {name: value for name, value in os.environ.items() if name not in TORCHRUN_VARIABLES}
    with TemporaryDirectory() as temporary:
        tokens = Path(temporary) / "samples.safetensors"
        save_file({f"{number:08}": sample.contiguous() for number, sample in enumerate(samples)}, tokens)
        call = [sys.executable, "-m", __name__, str(source), str(folder), str(tokens), str(int(kv_cache))]
        done = subprocess.run(call, env=alone, check=False, capture_output=True, text=True)
    if done.returncode:
        last = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]).rstrip(".")
        raise CheckpointError(
            f"{source} could not be quantised by modelopt: {last}. Correct this, or leave out `quantize`."
        )


def _quantize(source: Path, folder: Path, samples: Sequence[Tensor], kv_cache: bool) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = transformers_model(source).to(device)
    config = mtq.FP8_DEFAULT_CFG
    if kv_cache:
        config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])

    def calibrate(network: nn.Module) -> None:
        for tokens in samples:
            network(tokens.to(device))

    with warnings.catch_warnings(), torch.inference_mode(), whole_folder(folder) as partial:
        warnings.simplefilter("ignore")
        mtq.quantize(model, config, calibrate)
        export_hf_checkpoint(model, export_dir=str(partial))
        about = read_json(partial / "config.json")[QUANTISATION_KEY]
        write_json(partial / "config.json", read_json(source / "config.json") | {QUANTISATION_KEY: about})
        carry(source, partial)
        if (source / CARD).is_file():
            shutil.copyfile(source / CARD, partial / CARD)


def _main(source: str, folder: str, tokens: str, kv_cache: str) -> None:
    samples = load_file(tokens)
    _quantize(Path(source), Path(folder), [samples[name] for name in sorted(samples)], bool(int(kv_cache)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
