"""Make the teacher of the studies: a Llama of 8 million parameters, trained on Python code that every machine has.

    python examples/studies/make_teacher.py WORK [--steps N]

writes corpora, tokens and checkpoints to WORK, the model to WORK/teacher, and prints its hash. It can be resumed. The
text is the source of the standard library and of packages that `make install` installs; a fiftieth of the files is held
out.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

QUICKSTART = Path(__file__).parents[1] / "quickstart"
sys.path.insert(0, str(QUICKSTART))  # its make_teacher.py, before this file, which has the same name

import corpus as corpora  # noqa: E402
from make_teacher import Teacher  # noqa: E402

from minitron_megatron.convert import folder_hash  # noqa: E402
from minitron_megatron.layout import Shape  # noqa: E402

PACKAGES = (
    "huggingface_hub",
    "matplotlib",
    "megatron",
    "networkx",
    "numpy",
    "pydantic",
    "rich",
    "torch",
    "transformers",
)
SKIPPED_PARTS = {"test", "tests", "testing", "_internal", "_vendor"}
LONGEST = 200_000
"""Length in characters above which a file is taken for a generated table and left out."""


def sources() -> Iterator[tuple[str, str]]:
    """Yield (name, source) of every module, each text once, in the order of their names."""
    seen = set[str]()
    for name, source in _all_sources():
        digest = hashlib.sha256(source.encode()).hexdigest()
        if digest not in seen and len(source) <= LONGEST:
            seen.add(digest)
            yield name, source


def _all_sources() -> Iterator[tuple[str, str]]:
    yield from corpora.modules(Path(sysconfig.get_path("stdlib")))
    for package in PACKAGES:
        root = Path(sysconfig.get_path("purelib")) / package
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            name = path.relative_to(root.parent).with_suffix("").as_posix()
            if not SKIPPED_PARTS & set(name.split("/")):
                try:
                    with tokenize.open(path) as stream, warnings.catch_warnings():
                        warnings.simplefilter("ignore", SyntaxWarning)
                        source = stream.read()
                        compile(source, name, "exec")
                except (SyntaxError, ValueError):
                    continue  # a template, or a file for another Python
                yield name, source


def held_out(name: str) -> bool:
    """Return whether a module is of the fiftieth that is held out; it depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 50 == 0


def write_text(out: Path) -> None:
    """Write the corpora of the quickstart's form."""
    for file, size in corpora.write_separated(sources(), out, held_out).items():
        print(f"{file}.jsonl: {size:,} bytes of text", flush=True)


STUDIES = Teacher(
    Shape(layers=8, hidden=256, ffn=960, heads=8, kv_groups=4, head_dim=32, vocab=2048, tied=True),
    write_text,
    lr=1.5e-3,
    sequence=128,
    batch=16,
    dtype=torch.bfloat16,
    checkpoint_every=200,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the teacher of the studies.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args()
    teacher = args.work / "teacher"
    STUDIES.make(args.work, teacher, args.steps)
    print(f"{teacher}: model hash {folder_hash(teacher)}")


if __name__ == "__main__":
    main()
