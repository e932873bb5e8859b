"""A corpus in every format that is read."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

__all__ = ["COMMIT", "cache_of_the_hub", "every_format", "model_of_the_hub", "token_pair", "zst"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def zst(content: bytes) -> bytes:
    """Return content as a frame of Zstandard."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def token_pair(prefix: Path, texts: Sequence[str]) -> Path:
    """Write texts of words w1, w2, ... as a pair, with megatron-core's own builder; return its prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for text in texts:
        builder.add_item(torch.tensor([*(int(word[1:]) for word in text.split()), 0]))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def every_format(folder: Path, texts: Sequence[str]) -> None:
    """Write the files that docs/guide/data.md names, all but corpus.jsonl."""
    records, rows = [{"text": text} for text in texts], datasets.Dataset.from_dict({"text": list(texts)})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "corpus.json").write_text(json.dumps(records, indent=1))
    (folder / "corpus.txt.zst").write_bytes(zst("<|endoftext|>".join(texts).encode()))
    (folder / "shards" / "deep").mkdir(parents=True)
    for name in ("corpus.parquet", "shards/deep/1.parquet", "shards/2.parquet"):
        pyarrow.parquet.write_table(pa.table({"text": list(texts)}), folder / name)
    rows.save_to_disk(str(folder / "saved_data_set"))
    shutil.copy(next((folder / "saved_data_set").glob("*.arrow")), folder / "corpus.arrow")
    token_pair(folder / "corpus_text_document", texts)
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def cache_of_the_hub(folder: Path, texts: Sequence[str]) -> dict[str, str]:
    """Write a cache of `datasets` that holds `owner/name`; return the environment in which it is all there is."""
    place = folder / "owner___name" / "default" / "0.0.0" / "0123456789abcdef"
    made = datasets.Dataset.from_dict({"text": list(texts)})
    made.save_to_disk(str(folder / "made"))
    place.mkdir(parents=True)
    shutil.move(next((folder / "made").glob("*.arrow")), place / "name-train.arrow")
    split = datasets.SplitInfo("train", num_bytes=1, num_examples=len(texts), dataset_name="name")
    about = {"dataset_name": "name", "config_name": "default", "version": "0.0.0", "builder_name": "json"}
    info = datasets.DatasetInfo(features=made.features, splits=datasets.SplitDict({"train": split}), **about)
    info.write_to_directory(str(place))
    return {"HF_DATASETS_CACHE": str(folder), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}


def model_of_the_hub(folder: Path, model: Path) -> dict[str, str]:
    """Write a cache of `huggingface_hub` that holds `owner/tiny`; return the environment in which that is all."""
    place = folder / "models--owner--tiny"
    shutil.copytree(model, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
