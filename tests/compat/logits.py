"""`write FOLDER`: write exports of every family, and their logits by this environment's transformers.
`compare FOLDER`: compare them with the logits of another version."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-4
WHOLE_HEADS = {"qwen2_moe": {"hidden_size": 64}}
"""Families whose head_dim transformers 4.57 does not read: heads x head_dim must equal hidden."""
TOKENS = torch.arange(2, 42).view(2, 20)


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits.contiguous()


def write(work: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from minitron_megatron.convert import load_hf, save_hf
    from minitron_megatron.parallel import Topology
    from tests.convert.conftest import KINDS, make_folder

    topology = Topology.start()
    for kind in KINDS:
        source = make_folder(work / "source" / kind, kind, **WHOLE_HEADS.get(kind, {}))
        save_hf(load_hf(source, topology), work / "export" / kind, topology, files_from=source)
        save_file({"logits": logits(work / "export" / kind)}, work / f"{kind}.safetensors")
        if not torch.allclose(logits(work / "export" / kind), logits(source), atol=TOLERANCE):
            raise SystemExit(f"{kind}: the export is not its source")


def compare(work: Path) -> None:
    worst = 0.0
    for folder in sorted((work / "export").iterdir()):
        expected = load_file(work / f"{folder.name}.safetensors")["logits"]
        apart = float((logits(folder) - expected).abs().max())
        worst = max(worst, apart)
        print(f"transformers {transformers.__version__}  {folder.name:<14} largest difference {apart:.2e}")
    if worst > TOLERANCE:
        raise SystemExit(f"the largest difference is {worst:.2e}, more than {TOLERANCE}")


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
