"""Head-residual merge on the Hugging Face tensors, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_megatron.convert import load_hf, save_hf
from minitron_megatron.errors import PlanError
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose, merge_heads, trim
from minitron_megatron.records import Plan, Scores, Statistic
from minitron_megatron.testing import Pool
from tests.tiny import SHAPE, write_llama

MHA = replace(SHAPE, kv_groups=8)
SHAPES = {"gqa": SHAPE, "mha": MHA}
HEADS = {"gqa": 6, "mha": 6}
"""Heads kept of 8: three of the four in each group, and six of all."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("merge")
    return {name: write_llama(root / name, shape, 7) for name, shape in SHAPES.items()}


def ranked(name: str) -> Scores:
    generator = torch.Generator().manual_seed(2)
    heads = {i: torch.rand(8, dtype=torch.float64, generator=generator) for i in range(SHAPE.layers)}
    return Scores({"heads": heads}, SHAPES[name], Statistic(), 1, 1, "")


def by_hand(folder: Path, name: str, merge: str, sign: int) -> dict[str, Tensor]:
    """Return every kept head's tensors, merged, in the order of the heads."""
    full, out = load_file(folder / "model.safetensors"), {}
    groups = [range(0, 4), range(4, 8)] if name == "gqa" else [range(8)]
    for layer, units in ranked(name).values["heads"].items():
        partner, kept = {}, []
        for group in groups:
            best = sorted(group, key=lambda head: -float(units[head]))
            stay = 3 if name == "gqa" else 6
            kept += best[:stay]
            # by rank: of four, the third absorbs the fourth; of eight, the 6th absorbs the 7th and the 5th the 8th
            pairs = [(3, 4)] if name == "gqa" else [(6, 7), (5, 8)]
            partner |= {best[i - 1]: best[j - 1] for i, j in pairs}
        at = f"model.layers.{layer}.self_attn."
        for proj, dim in (("q", 0), ("o", 1), ("k", 0), ("v", 0)):
            if name == "gqa" and proj in "kv":
                continue
            heads = full[f"{at}{proj}_proj.weight"].movedim(dim, 0).unflatten(0, (8, 8))
            parts = []
            for head in sorted(kept):
                changed = head in partner and proj in merge
                parts.append(heads[head] + (sign * (heads[head] - heads[partner[head]]) if changed else 0))
            out[f"{at}{proj}_proj.weight"] = torch.cat(parts).movedim(0, dim)
    return out


def cut(topology: Topology, folder: Path, name: str, merge: str, sign: str, out: Path) -> None:
    model, scores = load_hf(folder, topology), ranked(name)
    plan = choose(scores, heads=HEADS[name])
    merge_heads(model, scores, plan, topology, merge=merge, sign=sign)
    save_hf(trim(model, plan, topology), out, topology)


CASES = [("gqa", "q", "printed"), ("gqa", "q+o", "reversed"), ("mha", "qkvo", "printed"), ("mha", "q", "reversed")]


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}])
@pytest.mark.parametrize(("name", "merge", "sign"), CASES)
def test_merged_by_hand(
    pool: Pool, folders: dict[str, Path], name: str, merge: str, sign: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    pool.run(cut, folders[name], name, merge, sign, tmp_path / "cut", **layout)
    found = load_file(tmp_path / "cut" / "model.safetensors")
    for tensor, want in by_hand(folders[name], name, merge, 1 if sign == "printed" else -1).items():
        assert torch.equal(found[tensor], want), tensor


@pytest.mark.parametrize(
    ("name", "sizes", "options", "message"),
    [
        ("gqa", {"heads": 2}, {}, "only 1 of 4 heads are kept, and each can absorb one"),
        ("gqa", {"heads": 6}, {"merge": "qkvo"}, "qkvo needs a key and a value for each head"),
        ("gqa", {"heads": 6}, {"merge": "qo"}, r"merge 'qo' is not known\. .*Use q or q\+o or qkvo"),
        ("gqa", {"heads": 6}, {"sign": "plus"}, "sign 'plus' is not known"),
        ("gqa", {}, {}, r"^heads are to be merged, but the plan cuts no heads\. Cut heads, or merge nothing\.$"),
        ("mha", {"heads": 3}, {}, "3 of 8 heads are kept"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    name: str, sizes: dict[str, int], options: dict[str, str], message: str
) -> None:
    plan: Plan = choose(ranked(name), **sizes)
    with pytest.raises(PlanError, match=message):
        merge_heads(None, ranked(name), plan, Topology(), **options)
