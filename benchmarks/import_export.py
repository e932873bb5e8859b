"""Bytes read by import, and memory of import and export, compared with the shard that a rank keeps.

    python benchmarks/import_export.py [FOLDER]

Makes a random bf16 Llama of about 1 GB, loads it at TP1, TP2 and PP2 and writes it back. Bounds: bytes read at most
1.1 of the shard; peak memory at most the shard and the largest tensor. `live` counts live tensors; the other figures
are the process's anonymous memory, which includes freed memory that the allocator keeps.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from record import record

from minitron_megatron.convert import Weights, flat_config, load_hf, save_hf
from minitron_megatron.convert.families import family_of
from minitron_megatron.convert.weights import SafetensorsWriter
from minitron_megatron.files import write_json
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import LivePeak, Pool

SHAPE = Shape(layers=8, hidden=2048, ffn=5632, heads=16, kv_groups=8, head_dim=128, vocab=32000)
DTYPE = torch.bfloat16


def make(folder: Path) -> tuple[int, int]:
    """Write the random checkpoint; return its bytes and those of the largest tensor."""
    config = ModelConfig(SHAPE, source={"model_type": "llama"})
    write_json(folder / "config.json", flat_config(config, "bfloat16"))
    tensors = list(family_of({"model_type": "llama"}).tensors(SHAPE))
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(folder / "model.safetensors", tensors, DTYPE) as writer:
        for name, shape in tensors:
            writer.add(name, torch.randn(shape, generator=generator).to(DTYPE))
    sizes = [torch.Size(shape).numel() * DTYPE.itemsize for _, shape in tensors]
    return sum(sizes), max(sizes)


def anonymous_bytes() -> int:
    """Return this process's anonymous memory: allocated memory without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon: this benchmark needs Linux")


@contextmanager
def peak(found: dict[str, int], name: str) -> Any:
    """Record the peak of anonymous memory above the start, sampled every 2 ms."""
    start, most, stop = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            most = max(most, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        found[name] = max(most, anonymous_bytes()) - start


def measure(topology: Topology, folder: Path, out: Path) -> dict[str, int]:
    """Measure one rank: bytes of the shard, requested bytes, and peaks."""
    torch.set_num_threads(1)
    found: dict[str, int] = {"asked": 0}
    read: Callable[..., Any] = Weights.read

    def counted(self: Weights, name: str, *ranges: tuple[int, int]) -> Any:
        tensor = read(self, name, *ranges)
        found["asked"] += tensor.numel() * tensor.element_size()
        return tensor

    Weights.read = counted  # type: ignore[method-assign]
    try:
        with peak(found, "import_peak"):
            model = load_hf(folder, topology, DTYPE)
    finally:
        Weights.read = read  # type: ignore[method-assign]
    found["shard"] = sum(p.numel() * p.element_size() for chunk in model for p in chunk.parameters())
    with peak(found, "export_extra"), LivePeak() as live:
        save_hf(model, out, topology)
    found["export_live"] = live.extra
    return found


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as work, Pool(timeout=600) as pool:
        folder = Path(work) / "model"
        folder.mkdir()
        total, largest = make(folder)
        for layout in ({}, {"tp": 2}, {"pp": 2}):
            ranks = pool.run(measure, folder, Path(work) / "out", **layout)
            same = (folder / "model.safetensors").read_bytes() == (Path(work) / "out/model.safetensors").read_bytes()
            record(
                "import_export",
                layout=layout or {"tp": 1},
                checkpoint_bytes=total,
                largest_tensor_bytes=largest,
                asked_over_shard=max(rank["asked"] / rank["shard"] for rank in ranks),
                import_peak_over_bound=max(rank["import_peak"] / (rank["shard"] + largest) for rank in ranks),
                export_live_over_largest=max(rank["export_live"] / largest for rank in ranks),
                export_extra_over_largest=max(rank["export_extra"] / largest for rank in ranks),
                bit_exact=same,
            )


if __name__ == "__main__":
    main()
