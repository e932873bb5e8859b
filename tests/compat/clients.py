"""`write FOLDER`: write exports of every family in several shapes, and the log-probabilities of our own models.
`table FOLDER`: compare each client's results with them; update benchmarks/results/clients.jsonl and the guide's table.
`clients.sh` runs both and, between them, each client's reader in an environment of its own."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from minitron_megatron.run.versions import versions  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "clients.jsonl"
PAGE = ROOT / "docs" / "guide" / "serving.md"
MARKS = ("<!-- made by tests/compat/clients.sh -->", "<!-- end -->")

TOLERANCE = 1e-3
"""Tolerance of log-probabilities in fp32: rounding differences are far below it, a misread head size far above."""

TOKENS = [int(token) for token in torch.randint(2, 500, (20,), generator=torch.Generator().manual_seed(3))]

TEACHER = {
    "vocab_size": 512,
    "hidden_size": 384,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "eos_token_id": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-tied", {}),  # without rotary scaling, which CTranslate2 computes differently
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3-tied", {}),
    "phi3": ("phi3", {}),
    "nemotron": ("nemotron", {}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 64}),
}
"""Family -> its kind in the tests of `convert`, and sizes that every client's kernels support."""

SHAPES = {"whole": {"ffn": 192}, "narrow": {"hidden": 192}, "odd": {"hidden": 160}}
"""Sizes of the students. heads x head_dim is 384, equal to hidden only in the first; 192 is a multiple of 6 heads,
160 is not."""

NAMES = {"narrow": "hidden ≠ heads x head_dim", "odd": "hidden no multiple of heads", "tied": "tied"}


@dataclass(frozen=True)
class Case:
    """One export."""

    family: str
    shape: str
    tied: bool = False
    architecture: str = "own"

    @property
    def name(self) -> str:
        return f"{self.family}.{'tied' if self.tied else self.shape}.{self.architecture}"


def cases() -> Iterator[Case]:
    for family in FAMILIES:
        yield from (Case(family, shape) for shape in SHAPES)
        yield Case(family, "whole", tied=True)
    yield Case("qwen2", "narrow", architecture="auto")


def write(work: Path) -> None:
    """Write WORK/exports/NAME and WORK/expected/NAME.npy for each case, and WORK/tokens.json."""
    from minitron_megatron.convert import load_hf, read_config, save_hf
    from minitron_megatron.convert.check import logits_of
    from minitron_megatron.data import Batch
    from minitron_megatron.parallel import Topology
    from minitron_megatron.prune import trim
    from minitron_megatron.records import Plan
    from tests.convert.conftest import make_folder

    topology, tokens = Topology.start(), torch.tensor([TOKENS])
    (work / "expected").mkdir(parents=True)
    (work / "tokens.json").write_text(json.dumps(TOKENS))
    for case in cases():
        teacher = work / "teachers" / f"{case.family}{'-tied' * case.tied}"
        if not teacher.exists():
            kind, sizes = FAMILIES[case.family]
            make_folder(teacher, kind, **TEACHER, **sizes, tie_word_embeddings=case.tied)
            _write_tokenizer(teacher)
        shape = read_config(teacher).shape
        keep: dict[str, dict[int | None, tuple[int, ...]]] = {}
        for axis, size in SHAPES[case.shape].items():
            if axis == "hidden":
                keep[axis] = {None: tuple(range(size))}
            elif shape.ffn:
                keep[axis] = {layer: tuple(range(size)) for layer in range(shape.layers)}
        student = trim(load_hf(teacher, topology), Plan(shape, keep), topology)
        save_hf(student, work / "exports" / case.name, topology, files_from=teacher, architecture=case.architecture)
        logits = logits_of(student, Batch(tokens, tokens, tokens >= 0), topology)
        np.save(work / "expected" / f"{case.name}.npy", logits[0].log_softmax(-1).detach().numpy())
    shutil.rmtree(work / "teachers")


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer, since some clients need one to load a folder; no text is tokenized."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    entries = {f"w{number}": number for number in range(TEACHER["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w1", "bos_token": "w2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def outcome(work: Path, client: str, name: str) -> dict[str, Any] | None:
    """Return `difference` in log-probabilities, or the `error`; None: this client was not run."""
    found, failed = work / "read" / client / f"{name}.npy", work / "read" / client / f"{name}.txt"
    if failed.exists():
        return {"error": failed.read_text().strip()}
    if not found.exists():
        return None
    expected, given = np.load(work / "expected" / f"{name}.npy"), np.load(found)
    difference = float(np.abs(expected[: len(given)] - given).max()) if np.isfinite(given).all() else float("inf")
    return {"difference": difference if difference < 1e30 else None}


def table(work: Path) -> None:
    """Replace the result lines of the clients that were run, and the guide's table."""
    ran = {path.name: (path / "version").read_text() for path in (work / "read").iterdir()}
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    lines = [line for line in lines if line["client"] not in ran]
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": versions()["commit"]}
    for client, version in sorted(ran.items()):
        for case in cases():
            found = outcome(work, client, case.name)
            if found is not None:
                named = {
                    "family": case.family,
                    "shape": case.shape,
                    "tied": case.tied,
                    "architecture": case.architecture,
                }
                lines.append({"client": client, "version": version, **named, **found, **about})
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, (begin, end) = PAGE.read_text(), MARKS
    page = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{markdown(lines)}{end}", text, flags=re.S)
    PAGE.write_text(page)
    print(markdown(lines))


def markdown(lines: list[dict[str, Any]]) -> str:
    """Return a table with one row per family and one column per client."""
    clients = {line["client"]: line["version"] for line in sorted(lines, key=lambda line: str(line["client"]).lower())}
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in sorted(lines, key=lambda line: list(FAMILIES).index(line["family"])):
        family = f"`{line['family']}`" + (" as a Llama" if line["architecture"] == "auto" else "")
        rows.setdefault(family, {}).setdefault(line["client"], []).append(line)
    titles = ["family", *(f"{client.split()[0]} {version}" for client, version in clients.items())]
    cells = [[family, *(word(of_client.get(client, [])) for client in clients)] for family, of_client in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in (titles, ["---"] * len(titles), *cells))


def word(lines: list[dict[str, Any]]) -> str:
    """Return a table cell: the students of a family that a client reads, and how it fails on the others."""
    failed = {"tied" if line["tied"] else line["shape"]: line for line in lines if not _equal(line)}
    if not failed:
        return "yes" if lines else ""
    if len(failed) == len(lines):
        return "no"
    where = [NAMES[shape] for shape in NAMES if shape in failed and not (shape == "odd" and "narrow" in failed)]
    silent = " **without an error**" if any("error" not in line for line in failed.values()) else ""
    return f"not where {' or '.join(where)}{silent}"


def _equal(line: dict[str, Any]) -> bool:
    return "error" not in line and line["difference"] is not None and line["difference"] < TOLERANCE


if __name__ == "__main__":
    {"write": write, "table": table}[sys.argv[1]](Path(sys.argv[2]))
