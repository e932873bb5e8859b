"""Train the quickstart's tokenizer: byte-level BPE with 1,536 entries, on the corpora of `corpus.py`.

    python examples/quickstart/tokenizer.py CORPUS OUT

`transformers.AutoTokenizer` can load OUT. Token 0 ends a document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ENTRIES = 1536
END = "<|endoftext|>"
FILES = ("code", "prose")


def texts(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train(corpus: Path, entries: int = ENTRIES) -> Tokenizer:
    """Train a tokenizer of `entries` entries on the training parts of `corpus`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=entries, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for name in FILES for text in texts(corpus / f"{name}.jsonl")), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, out: Path) -> None:
    special = {"eos_token": END, "pad_token": END}
    config = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def bytes_per_token(tokenizer: Tokenizer, file: Path) -> float:
    size = count = 0
    for text in texts(file):
        size += len(text.encode())
        count += len(tokenizer.encode(text).ids)
    return size / count


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the quickstart's tokenizer.")
    parser.add_argument("corpus", type=Path, help="the folder that corpus.py wrote")
    parser.add_argument("out", type=Path, help="the folder to write to")
    args = parser.parse_args()
    tokenizer = train(args.corpus)
    save(tokenizer, args.out)
    for name in FILES:
        print(f"{name}: {bytes_per_token(tokenizer, args.corpus / f'{name}.valid.jsonl'):.2f} bytes per held-out token")


if __name__ == "__main__":
    main()
