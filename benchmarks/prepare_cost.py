"""Tokens a second of one process of `prepare`, beside other tools on the same text and tokenizer, and its peak memory.

    python benchmarks/prepare_cost.py speed TOKENIZER TEXT.jsonl [--datatrove PYTHON]
    python benchmarks/prepare_cost.py memory TOKENIZER TEXT.jsonl MEGABYTES LARGEST

TOKENIZER: a Hugging Face folder. All of `speed` go from the lines of JSON to token ids on the disk, in one process with
one thread, in turn; medians. `megatron` is the loop of Megatron-LM's `preprocess_data.py`, which is not part of
megatron-core: written here from knowledge of it (json.loads, the tokenizer's `input_ids`, the end-of-document id, and
megatron-core's own builder). `datatrove` runs in the Python that has it. `floor` only tokenizes: the lines are already
read, and nothing is written.

`memory` repeats the text to MEGABYTES, of which one record has LARGEST megabytes, in a folder that is then removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

from clock import seconds
from record import record

from minitron_megatron.data import end_of_document, load_tokenizer, prepare

REPEATS = 3
DATATROVE = """
import sys, time
from pathlib import Path
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
tokenizer, text, out, end = sys.argv[1:]
text = Path(text)
steps = [
    JsonlReader(str(text.parent), glob_pattern=text.name),
    DocumentTokenizer(out + "/tokens", tokenizer_name_or_path=tokenizer + "/tokenizer.json", eos_token=end,
                      shuffle_documents=False, local_working_dir=None),
]
wall, cpu = time.perf_counter(), time.process_time()
LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=out + "/logs").run()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print("measured", wall, cpu, sum(path.stat().st_size for path in Path(out, "tokens").glob("*.ds")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for name, work in (("speed", speed), ("memory", memory)):
        verb = verbs.add_parser(name)
        verb.add_argument("tokenizer", type=Path)
        verb.add_argument("text", type=Path)
        verb.set_defaults(work=work)
        if name == "speed":
            verb.add_argument("--datatrove", help="Python of an environment that has it")
        else:
            verb.add_argument("megabytes", type=int)
            verb.add_argument("largest", type=int)
    args = parser.parse_args()
    args.work(args)


def speed(args: argparse.Namespace) -> None:
    tools: dict[str, Tool] = {"prepare": ours, "megatron": megatron, "datasets": by_datasets, "floor": floor}
    if args.datatrove:
        tools["datatrove"] = lambda *where: datatrove(args.datatrove, *where)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
    counts = {}
    for repeat in range(REPEATS + 1):
        for name, tool in tools.items():
            with tempfile.TemporaryDirectory() as folder:
                taken, counts[name] = tool(args.tokenizer, args.text, Path(folder))
            if repeat:  # the first includes imports
                times[name].append(taken)
    assert len(set(counts.values())) == 1, counts

    def ratio(name: str, clock: int) -> dict[str, float]:
        ratios = [other[clock] / mine[clock] for mine, other in zip(times["prepare"], times[name], strict=True)]
        return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}

    record(
        "prepare_cost",
        text=args.text.name,
        tokens=counts["prepare"],
        tokens_per_cpu_second={name: counts[name] / median(cpu for _, cpu in each) for name, each in times.items()},
        speed_over={name: {"cpu": ratio(name, 1), "wall": ratio(name, 0)} for name in tools if name != "prepare"},
    )


Measured = tuple[tuple[float, float], int]
"""(wall, CPU) seconds, and the number of tokens."""
Tool = Callable[[Path, Path, Path], Measured]
"""(tokenizer, text, empty folder) -> what it took."""


def ours(tokenizer: Path, text: Path, folder: Path) -> Measured:
    made: list[Any] = []
    taken = seconds(lambda: made.append(prepare([text], tokenizer, folder / "x", validation=0)))
    return taken, made[0].train.tokens


def megatron(tokenizer: Path, text: Path, folder: Path) -> Measured:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokens, end = 0, end_of_document(tokenizer, load_tokenizer(tokenizer))

    def work() -> None:
        nonlocal tokens
        read = transformers(tokenizer)
        builder = IndexedDatasetBuilder(str(folder / "x.bin"), dtype=DType.optimal_dtype(len(read)))
        with text.open(encoding="utf-8") as lines:
            for line in lines:
                ids = read(json.loads(line)["text"], add_special_tokens=False).input_ids
                ids.append(end)
                builder.add_document(ids, [len(ids)])
                tokens += len(ids)
        builder.finalize(str(folder / "x.idx"))

    return seconds(work), tokens


def transformers(tokenizer: Path) -> Any:
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    return AutoTokenizer.from_pretrained(str(tokenizer))


def by_datasets(tokenizer: Path, text: Path, folder: Path) -> Measured:
    import datasets

    datasets.disable_progress_bars()
    end, made = end_of_document(tokenizer, load_tokenizer(tokenizer)), list[Any]()
    read = transformers(tokenizer)

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = read(batch["text"], add_special_tokens=False, return_attention_mask=False).input_ids
        return {"input_ids": [[*ids, end] for ids in found]}

    def work() -> None:
        rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder))
        made.append(rows.map(tokens, batched=True, remove_columns=rows.column_names))

    taken = seconds(work)
    return taken, sum(map(len, made[0].with_format("numpy")["input_ids"]))


def floor(tokenizer: Path, text: Path, folder: Path) -> Measured:
    read = load_tokenizer(tokenizer)
    texts = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    found: list[Any] = []
    taken = seconds(lambda: found.extend(read.encode_batch(texts, add_special_tokens=False)))
    return taken, sum(len(each) + 1 for each in found)


def datatrove(python: str, tokenizer: Path, text: Path, folder: Path) -> Measured:
    reader = load_tokenizer(tokenizer)
    end = str(reader.id_to_token(end_of_document(tokenizer, reader)))
    code = [python, "-c", DATATROVE, str(tokenizer), str(text), str(folder), end]
    said = subprocess.run(code, capture_output=True, text=True, check=True).stdout
    [line] = [line for line in said.splitlines() if line.startswith("measured")]
    wall, cpu, size = map(float, line.split()[1:])
    return (wall, cpu), int(size) // (2 if reader.get_vocab_size() <= 1 << 16 else 4)


def memory(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        write_text(args.text, text, args.megabytes, args.largest)
        code = [sys.executable, "-c", PEAK, str(text), str(args.tokenizer), str(Path(folder) / "x")]
        said = subprocess.run(code, capture_output=True, text=True, check=True).stdout.split()
    before, peak, tokens, cpu = map(float, said[-4:])
    largest = args.largest * 1e6
    record(
        "prepare_memory",
        megabytes=args.megabytes,
        largest_megabytes=args.largest,
        tokens=int(tokens),
        cpu_seconds=cpu,
        start_megabytes=before / 1e6,
        peak_megabytes=peak / 1e6,
        bytes_per_byte_of_the_largest_record=(peak - before) / largest if largest else None,
    )


PEAK = """
import resource, sys
from minitron_megatron.data import load_tokenizer, prepare

def most():  # ru_maxrss would begin with that of the process that started this one
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

if __name__ == "__main__":
    load_tokenizer(sys.argv[2])
    before = most()
    made = prepare([sys.argv[1]], sys.argv[2], sys.argv[3], validation=0)
    print(before, most(), made.train.tokens, resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


def write_text(source: Path, to: Path, megabytes: int, largest: int) -> None:
    """Write the documents of `source` again and again; in the middle one that is all of them, to `largest`."""
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    one, at = "\n".join(texts), 0
    with to.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6 or largest:
            if largest and file.tell() >= (megabytes - largest) * 0.5e6:
                long = one * (largest * 1_000_000 // len(one.encode()) + 1)
                file.write(json.dumps({"text": long[: largest * 1_000_000]}, ensure_ascii=False) + "\n")
                largest = 0
            file.write(json.dumps({"text": texts[at % len(texts)]}, ensure_ascii=False) + "\n")
            at += 1


if __name__ == "__main__":
    main()
