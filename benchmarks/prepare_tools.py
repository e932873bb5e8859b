"""One tool of `prepare_cost.py`: from lines of JSON to token ids on the disk, in one process with one thread.

    python benchmarks/prepare_tools.py TOOL TOKENIZER END

reads lines of JSON, each the path of a text and of an empty folder for what the tool writes; to each it answers with
the (wall, CPU) seconds that it took and the number of tokens. END: the end-of-document token.

`megatron` is the loop of Megatron-LM's `preprocess_data.py`, which is not part of megatron-core: written here from
knowledge of it (json.loads, the tokenizer's `input_ids`, the end-of-document id, and megatron-core's own builder).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ANSWER = "measured"
"""First word of an answer; what tools print themselves has another."""
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


def prepare(tokenizer: str, text: str, folder: str, end: str) -> int:
    from minitron_megatron.data import prepare

    return prepare([text], tokenizer, Path(folder) / "x", validation=0).train.tokens


def megatron(tokenizer: str, text: str, folder: str, end: str) -> int:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    read, tokens = transformers(tokenizer), 0
    last = read.convert_tokens_to_ids(end)
    builder = IndexedDatasetBuilder(f"{folder}/x.bin", dtype=DType.optimal_dtype(len(read)))
    with open(text, encoding="utf-8") as lines:
        for line in lines:
            ids = read(json.loads(line)["text"], add_special_tokens=False).input_ids
            ids.append(last)
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{folder}/x.idx")
    return tokens


def transformers(tokenizer: str) -> Any:
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    return AutoTokenizer.from_pretrained(tokenizer)


def datasets(tokenizer: str, text: str, folder: str, end: str) -> int:
    import datasets
    from pyarrow import compute

    datasets.disable_progress_bars()
    read = transformers(tokenizer)
    last = read.convert_tokens_to_ids(end)

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = read(batch["text"], add_special_tokens=False, return_attention_mask=False).input_ids
        return {"input_ids": [[*ids, last] for ids in found]}

    rows = datasets.load_dataset("json", data_files=text, split="train", cache_dir=folder)
    made = rows.map(tokens, batched=True, remove_columns=rows.column_names)
    return compute.sum(compute.list_value_length(made.data.column("input_ids"))).as_py()


def datatrove(tokenizer: str, text: str, folder: str, end: str) -> int:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from tokenizers import Tokenizer

    file, out, name = Path(text), f"{folder}/tokens", f"{tokenizer}/tokenizer.json"
    settings = {"eos_token": end, "shuffle_documents": False, "local_working_dir": None}
    steps = [
        JsonlReader(str(file.parent), glob_pattern=file.name),
        DocumentTokenizer(out, tokenizer_name_or_path=name, **settings),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{folder}/logs").run()
    width = 2 if Tokenizer.from_file(name).get_vocab_size() <= 1 << 16 else 4
    return sum(path.stat().st_size for path in Path(out).glob("*.ds")) // width


def serve(name: str, tokenizer: str, end: str) -> None:
    tools = {"prepare": prepare, "megatron": megatron, "datasets": datasets, "datatrove": datatrove}
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = tools[name](tokenizer, *json.loads(line), end)
        print(ANSWER, time.perf_counter() - wall, time.process_time() - cpu, tokens, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
