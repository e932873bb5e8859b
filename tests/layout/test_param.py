"""Grammar of dims, and shards and roles derived from it, against loops written out by hand."""

from __future__ import annotations

import pytest

from minitron_megatron.layout import Axis, Param, coords, lookup
from minitron_megatron.layout.param import parse

SIZES = {"kv_group": 4, "q": 2, "head_dim": 3, "ffn": 6, "hidden": 5, "gate": 1, "vocab": 8}
QKV = lookup("decoder.layers.0.self_attention.linear_qkv.weight")
PROJ = lookup("decoder.layers.0.self_attention.linear_proj.weight")
FC1 = lookup("decoder.layers.0.mlp.linear_fc1.weight")


def qkv_rows() -> list[dict[str, int]]:
    """Return every row of a fused QKV, in memory order."""
    rows = []
    for group in range(4):
        for head in ("q0", "q1", "k", "v"):
            for channel in range(3):
                rows.append(
                    {
                        "kv_group": group,
                        "q": int(head[1]) if head[0] == "q" else -1,
                        "k": 0 if head == "k" else -1,
                        "v": 0 if head == "v" else -1,
                        "head_dim": channel,
                    }
                )
    return rows


def as_rows(dim: str, sizes: dict[str, int]) -> list[dict[str, int]]:
    at = coords(dim, sizes)
    return [dict(zip(at, row, strict=True)) for row in zip(*(column.tolist() for column in at.values()), strict=True)]


def test_no_caller_changes_the_coordinates_of_another() -> None:
    at = coords("(gate + up) ffn", SIZES)
    at["ffn"][:] = 7
    with pytest.raises(TypeError, match="does not support item assignment"):
        at["ffn"] = at["gate"]  # type: ignore[index]
    test_gated_fc1_holds_all_of_gate_then_all_of_up()


def test_qkv_is_interleaved_by_group() -> None:
    assert as_rows("kv_group (q + k + v) head_dim", SIZES) == qkv_rows()


def test_gated_fc1_holds_all_of_gate_then_all_of_up() -> None:
    want = [{"gate": 0, "up": -1, "ffn": n} for n in range(6)] + [{"gate": -1, "up": 0, "ffn": n} for n in range(6)]
    assert as_rows("(gate + up) ffn", SIZES) == want


def test_a_gate_of_size_0_leaves_up_alone() -> None:
    ungated = {**SIZES, "gate": 0}
    assert as_rows("(gate + up) ffn", ungated) == [{"gate": -1, "up": 0, "ffn": n} for n in range(6)]
    assert FC1.shape(ungated) == (6, 5)
    assert FC1.role_rows(0, "gate", ungated).tolist() == []
    assert FC1.role_rows(0, "up", ungated).tolist() == list(range(6))


@pytest.mark.parametrize(
    ("dim", "rows"), [("ffn", 6), ("q head_dim", 6), ("q + k", 3), ("(q + k) (head_dim + v)", 12), ("role", 1)]
)
def test_lengths_are_sums_and_products(dim: str, rows: int) -> None:
    assert len(as_rows(dim, SIZES)) == rows
    assert Param((dim,)).shape(SIZES) == (rows,)


def test_product_binds_closer_than_sum() -> None:
    assert parse("q head_dim + v") == parse("(q head_dim) + v") != parse("q (head_dim + v)")


@pytest.mark.parametrize(
    ("dim", "said"),
    [
        *((dim, "a word is missing") for dim in ("", "q +", "+ q", "q ()")),
        *((dim, "a bracket is not closed") for dim in ("(q", "(q + k")),
        ("q)", "')' does not belong here"),
        ("Q", "'Q' is not a word"),
        ("q 3", "'3' is not a word"),
        ("q * k", "'*' is not a word"),
        ("q, k", "',' is not a word"),
    ],
)
def test_text_outside_the_grammar_is_refused(dim: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(dim)
    assert str(caught.value) == f"dim {dim!r}: {said}"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rank_holds_whole_groups_of_qkv(world: int) -> None:
    for rank in range(world):
        groups = range(rank * 4 // world, (rank + 1) * 4 // world)
        want = [n for n, row in enumerate(qkv_rows()) if row["kv_group"] in groups]
        assert QKV.shard_rows(0, SIZES, rank, world).tolist() == want
        assert QKV.shard_rows(1, SIZES, rank, world).tolist() == list(range(5))


def test_a_rank_holds_its_range_of_gate_and_its_range_of_up() -> None:
    assert FC1.shard_rows(0, SIZES, 0, 2).tolist() == [0, 1, 2, 6, 7, 8]
    assert FC1.shard_rows(0, SIZES, 1, 2).tolist() == [3, 4, 5, 9, 10, 11]


@pytest.mark.parametrize("param", [QKV, PROJ, FC1], ids=["qkv", "proj", "fc1"])
def test_the_shards_partition_the_rows_and_their_owners_say_so(param: Param) -> None:
    dim = param.tp_dim
    assert dim is not None
    shards = [param.shard_rows(dim, SIZES, rank, 2).tolist() for rank in range(2)]
    assert sorted(shards[0] + shards[1]) == list(range(param.shape(SIZES)[dim]))
    owner = param.owner(dim, SIZES, 2)
    assert owner is not None
    assert [[n for n, rank in enumerate(owner.tolist()) if rank == r] for r in range(2)] == shards
    assert param.owner(dim, SIZES, 1) is None and param.owner(1 - dim, SIZES, 2) is None


def test_role_rows_of_qkv() -> None:
    for role in "qkv":
        want = [n for n, row in enumerate(qkv_rows()) if row[role] >= 0]
        assert QKV.role_rows(0, role, SIZES).tolist() == want


def test_the_split_dim_and_its_stride() -> None:
    assert (QKV.tp_dim, PROJ.tp_dim, FC1.tp_dim, Param(("hidden",)).tp_dim) == (0, 1, 0, None)
    assert (QKV.stride(SIZES), PROJ.stride(SIZES), FC1.stride(SIZES), FC1.stride({**SIZES, "gate": 0})) == (1, 1, 2, 1)


def test_an_axis_is_a_name_and_a_size() -> None:
    assert Axis("ffn", 8) == Axis(name="ffn", size=8) != Axis("ffn", 9)
