"""onnxruntime-genai, by its own model builder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from reading import main


def read(folder: Path, tokens: list[int]) -> np.ndarray:
    import onnxruntime_genai

    with TemporaryDirectory() as work:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
        built = subprocess.run(
            [*builder, "-i", str(folder), "-o", work, "-c", work], capture_output=True, text=True, check=False
        )
        if built.returncode:
            raise RuntimeError(built.stderr.strip().splitlines()[-1])
        model = onnxruntime_genai.Model(work)
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(max_length=len(tokens) + 1)
        generator = onnxruntime_genai.Generator(model, settings)
        rows = []
        for token in tokens:
            generator.append_tokens([token])
            rows.append(np.array(generator.get_logits()).reshape(-1))
        return np.stack(rows)


if __name__ == "__main__":
    main("onnxruntime-genai", "onnxruntime-genai", read)
