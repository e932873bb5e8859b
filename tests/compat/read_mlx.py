"""MLX-LM: the logits of a model that it loads without a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from reading import main


def read(folder: Path, tokens: list[int]) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    return np.array(model(mx.array([tokens])).astype(mx.float32))[0]


if __name__ == "__main__":
    main("MLX-LM", "mlx-lm", read)
