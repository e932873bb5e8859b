"""Tokens a second of one process of `prepare`, beside other tools on the same text and tokenizer, and its peak memory.

    python benchmarks/prepare_cost.py speed TOKENIZER TEXT.jsonl [--datatrove PYTHON] [--repeats N]
    python benchmarks/prepare_cost.py memory TOKENIZER TEXT.jsonl MEGABYTES LARGEST

TOKENIZER: a Hugging Face folder. All tools of `speed` (`prepare_tools.py`) go from the lines of JSON to token ids on
the disk, each in a process of its own with one thread, in turn; ratios of pairs, and their median. Start-up is measured
apart: from the start of the process to the end of a text of one line. `datatrove` runs in the Python that has it.

`memory` repeats the text to MEGABYTES, of which one record has LARGEST megabytes, in a folder that is then removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Self

from prepare_tools import ANSWER
from record import record

from minitron_megatron.data import end_of_document, load_tokenizer

REPEATS = 5
TOOLS = Path(__file__).with_name("prepare_tools.py")


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
            verb.add_argument("--repeats", type=int, default=REPEATS)
        else:
            verb.add_argument("megabytes", type=int)
            verb.add_argument("largest", type=int)
    args = parser.parse_args()
    args.work(args)


def speed(args: argparse.Namespace) -> None:
    pythons = {name: sys.executable for name in ("prepare", "megatron", "datasets")}
    if args.datatrove:
        pythons["datatrove"] = args.datatrove
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        line = Path(folder) / "line.jsonl"
        with args.text.open(encoding="utf-8") as text:
            line.write_text(text.readline(), encoding="utf-8")
        tools = {name: stack.enter_context(Tool(name, python, args.tokenizer)) for name, python in pythons.items()}
        start = {name: tool.start(line) for name, tool in tools.items()}
        for number in range(args.repeats):
            counts = set()
            for name, tool in tools.items():
                taken, tokens = tool(args.text)
                times[name].append(taken)
                counts.add(tokens)
                print(number, name, *taken, tokens, file=sys.stderr, flush=True)
            assert len(counts) == 1, counts

    def ratio(name: str, clock: int, *, started: bool = False) -> dict[str, float]:
        """Return the other tool's seconds over those of `prepare`, of each pair. started: count the start-ups."""
        mine, other = ([each[clock] + started * start[tool] for each in times[tool]] for tool in ("prepare", name))
        ratios = [theirs / ours for ours, theirs in zip(mine, other, strict=True)]
        return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}

    record(
        "prepare_cost",
        tokenizer=args.tokenizer.name,
        text=args.text.name,
        bytes=args.text.stat().st_size,
        tokens=tokens,
        pairs=args.repeats,
        start_cpu_seconds=start,
        tokens_per_cpu_second={name: tokens / median(cpu for _, cpu in each) for name, each in times.items()},
        speed_over={
            name: {"cpu": ratio(name, 1), "wall": ratio(name, 0), "cpu_with_start": ratio(name, 1, started=True)}
            for name in pythons
            if name != "prepare"
        },
    )


class Tool:
    """A process of `prepare_tools.py`."""

    def __init__(self, name: str, python: str, tokenizer: Path) -> None:
        reader = load_tokenizer(tokenizer)
        end = str(reader.id_to_token(end_of_document(tokenizer, reader)))
        code = [python, str(TOOLS), name, str(tokenizer), end]
        self._process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, text: Path) -> tuple[tuple[float, float], int]:
        """Return the (wall, CPU) seconds of a text, and the number of its tokens."""
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps([str(text), folder]), file=self._process.stdin, flush=True)
            answer = next(line for line in self._process.stdout if line.startswith(ANSWER))
        wall, cpu, tokens = answer.split()[1:]
        return (float(wall), float(cpu)), int(tokens)

    def start(self, text: Path) -> float:
        """Return the CPU seconds of the process up to the end of its first text."""
        self(text)
        user, system = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def memory(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        write_text(args.text, text, args.megabytes, args.largest)
        code = [sys.executable, "-c", PEAK, str(text), str(args.tokenizer), str(Path(folder) / "x")]
        said = subprocess.run(code, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    before, peak, tokens, cpu = map(float, said[-4:])
    largest = args.largest * 1e6
    record(
        "prepare_memory",
        tokenizer=args.tokenizer.name,
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
    texts = [json.loads(line)["text"] for line in source.open(encoding="utf-8")]
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
