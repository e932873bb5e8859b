"""llama.cpp: its own conversion to GGUF and its own server, from the prebuilt package xllamacpp.

LLAMA_CPP is the path of llama.cpp's source, which llama-cpp-python's source archive on PyPI has in vendor/llama.cpp."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from reading import main

WORDS = ["<unk>", "<s>", "</s>", "<|endoftext|>", *(f"w{number}" for number in range(4, 512))]
"""Phi-3's special tokens, whose attributes llama.cpp changes."""


def convert(folder: Path, file: Path) -> None:
    """Convert as `convert_hf_to_gguf.py --outtype f32`, with our vocabulary; it knows only those of real models."""
    source = Path(os.environ["LLAMA_CPP"])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import gguf

    def set_vocab(model: Any) -> None:
        model.gguf_writer.add_tokenizer_model("llama")
        model.gguf_writer.add_token_list(WORDS)
        model.gguf_writer.add_token_scores([0.0] * len(WORDS))
        model.gguf_writer.add_token_types([int(gguf.TokenType.NORMAL)] * len(WORDS))

    script = importlib.import_module("convert_hf_to_gguf")
    hparams = script.ModelBase.load_hparams(folder, False)
    model_class = script.get_model_class(script.get_model_architecture(hparams, script.ModelType.TEXT))
    model_class.set_vocab = set_vocab
    model_class(folder, gguf.LlamaFileType.ALL_F32, file).write()


def read(folder: Path, tokens: list[int]) -> np.ndarray:
    import xllamacpp

    with TemporaryDirectory() as work:
        file = Path(work) / "model.gguf"
        convert(folder, file)
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 64, 1, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        server = xllamacpp.Server(params)
        return np.array([_next(server, tokens[: end + 1]) for end in range(len(tokens))])


def _next(server: Any, tokens: list[int]) -> list[float]:
    """Return the log-probabilities of every possible next token."""
    asked = {"prompt": tokens, "n_predict": 1, "n_probs": len(WORDS), "temperature": 0.0}
    [given] = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    by_token = {each["id"]: each["logprob"] for each in given["top_logprobs"]}
    return [by_token[token] for token in range(len(WORDS))]


if __name__ == "__main__":
    main("llama.cpp", "xllamacpp", read)
