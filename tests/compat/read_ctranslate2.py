"""CTranslate2: its own conversion, and its log-probabilities of a prompt."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from reading import main


def read(folder: Path, tokens: list[int]) -> np.ndarray:
    import ctranslate2

    with TemporaryDirectory() as work:
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        converter.convert(f"{work}/model", vmap=None, quantization=None, force=True)
        model = ctranslate2.Generator(f"{work}/model", device="cpu", compute_type="float32")
        words = [[f"w{token}" for token in tokens]]
        return np.array(model.forward_batch(words, return_log_probs=True))[0]


if __name__ == "__main__":
    main("CTranslate2", "ctranslate2", read)
