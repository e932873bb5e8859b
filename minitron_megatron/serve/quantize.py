"""FP8 by nvidia-modelopt, on a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..convert import carry, read_config, transformers_model
from ..errors import CheckpointError, PlanError
from ..files import read_json, whole_folder, write_json
from ..layout import Shape

__all__ = ["check_fp8", "quantize_fp8"]

MULTIPLE = 16
"""Of every dim of an FP8 matrix multiplication."""
OF_A_WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes."""
OF_QUANTISATION = "quantization_config"
CARD = "README.md"


def check_fp8(shape: Shape) -> None:
    """Raises PlanError where a dim cannot be multiplied in FP8."""
    dims = {"hidden": shape.hidden, "ffn": shape.ffn, "expert_ffn": shape.expert_ffn, "shared_ffn": shape.shared_ffn}
    dims |= {"heads x head_dim": shape.heads * shape.head_dim, "kv_groups x head_dim": shape.kv_groups * shape.head_dim}
    for name, size in dims.items():
        if size % MULTIPLE:
            below = size // MULTIPLE * MULTIPLE
            raise PlanError(
                f"FP8 needs multiples of {MULTIPLE}, and {name} is {size}. "
                f"Prune to {below} or {below + MULTIPLE}, or leave export.quantize out."
            )


def quantize_fp8(source: Path, folder: Path, samples: Sequence[Tensor], *, kv_cache: bool = False) -> None:
    """Post-training quantisation: weights and inputs of the layers' matrices e4m3 with a scale each, found on `samples`
    (token ids int64 [batch, seq]); embedding, output layer and norms stay. On one GPU if there is one.

    kv_cache: keys and values too. The config stays the source's flat one, which all readers read alike. It runs in a
    process of its own, since modelopt reduces scales over the ranks of whatever world it finds itself in. Raises
    CheckpointError where that process fails.
    """
    check_fp8(read_config(source).shape)
    alone = {name: value for name, value in os.environ.items() if name not in OF_A_WORLD}
    with TemporaryDirectory() as temporary:
        tokens = Path(temporary) / "samples.safetensors"
        save_file({f"{number:08}": sample.contiguous() for number, sample in enumerate(samples)}, tokens)
        call = [sys.executable, "-m", __name__, str(source), str(folder), str(tokens), str(int(kv_cache))]
        done = subprocess.run(call, env=alone, check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise CheckpointError(f"{source} could not be quantised: {' '.join(last)}.")


def _quantize(source: Path, folder: Path, samples: Sequence[Tensor], kv_cache: bool) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = transformers_model(source).to(device)
    config: Any = mtq.FP8_DEFAULT_CFG
    if kv_cache:
        config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])

    def calibrate(network: Any) -> None:
        for tokens in samples:
            network(tokens.to(device))

    with warnings.catch_warnings(), torch.inference_mode(), whole_folder(folder) as partial:
        warnings.simplefilter("ignore")
        mtq.quantize(model, config, calibrate)
        export_hf_checkpoint(model, export_dir=str(partial))
        about = read_json(partial / "config.json")[OF_QUANTISATION]
        write_json(partial / "config.json", read_json(source / "config.json") | {OF_QUANTISATION: about})
        carry(source, partial)
        if (source / CARD).is_file():
            shutil.copyfile(source / CARD, partial / CARD)


def _main(source: str, folder: str, tokens: str, kv_cache: str) -> None:
    samples = load_file(tokens)
    _quantize(Path(source), Path(folder), [samples[name] for name in sorted(samples)], bool(int(kv_cache)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
