"""llama.cpp: its own conversion to GGUF, of the weights alone, and its Python binding.

LLAMA_CPP names its source folder, which the binding's source archive on PyPI holds as `vendor/llama.cpp`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from reading import main


def convert(folder: Path, file: Path) -> None:
    """What `convert_hf_to_gguf.py --outtype f32` does, but for the tokenizer: it knows those of real models alone."""
    source = Path(os.environ["LLAMA_CPP"])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import gguf

    script = importlib.import_module("convert_hf_to_gguf")
    hparams = script.ModelBase.load_hparams(folder, False)
    model_class = script.get_model_class(script.get_model_architecture(hparams, script.ModelType.TEXT))
    model_class.set_vocab = lambda model: model._set_vocab_none()
    model_class(folder, gguf.LlamaFileType.ALL_F32, file).write()


def read(folder: Path, tokens: list[int]) -> np.ndarray:
    from llama_cpp import Llama

    with TemporaryDirectory() as work:
        file = Path(work) / "model.gguf"
        convert(folder, file)
        model = Llama(str(file), n_ctx=64, logits_all=True, n_threads=1, verbose=True)
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])


if __name__ == "__main__":
    main("llama.cpp", "llama-cpp-python", read)
