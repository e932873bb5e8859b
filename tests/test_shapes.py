"""A tensor that differs from its annotation fails a test, in its process and in the pool's workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minitron_megatron.data import Batch
from minitron_megatron.losses import Output, Vocabulary, attach_loss, lm_loss, state_loss
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.shapes import ShapeError, checked

BATCH, SEQ, HIDDEN, VOCAB = 2, 3, 4, 8


def test_a_wrong_shape_of_a_field_is_refused() -> None:
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.int64)
    with pytest.raises(
        ShapeError, match=r"Batch.__init__: mask is torch.bool \(3, 2\), not Bool\[Tensor, 'batch seq'\]"
    ):
        Batch(tokens, tokens, torch.ones(SEQ, BATCH, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"weight is torch.float32 \(8, 5\)"):
        Output(torch.zeros(SEQ, BATCH, HIDDEN), torch.zeros(VOCAB, HIDDEN + 1))


def test_a_wrong_dtype_of_an_argument_is_refused() -> None:
    states, counts = torch.zeros(SEQ, BATCH, HIDDEN), torch.ones(SEQ, BATCH)
    with pytest.raises(ShapeError, match=r"state_loss: counts is torch.float32 \(3, 2\), not Bool"):
        state_loss(states, states, counts, "mse", lambda student: student)
    with pytest.raises(ShapeError, match="attach_loss: loss"):
        attach_loss(states, torch.zeros(1), torch.zeros(()))


def transposed_mask(topology: Topology) -> None:
    output = Output(torch.zeros(SEQ, BATCH, HIDDEN), torch.zeros(VOCAB, HIDDEN))
    labels, mask = torch.zeros(BATCH, SEQ, dtype=torch.int64), torch.ones(SEQ, BATCH, dtype=torch.bool)
    lm_loss(output, labels, mask, Vocabulary(VOCAB, topology.tp_group))


def test_a_wrong_shape_is_refused_in_a_worker(pool: Pool) -> None:
    with pytest.raises(ShapeError, match="lm_loss: mask"):
        pool.run(transposed_mask)


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        ("Int64[Tensor, 'rows'] | None", None, torch.zeros(2, 2, dtype=torch.int64)),
        ("tuple[Float[Tensor, 'a'], Float[Tensor, 'a b']]", (torch.ones(2), torch.ones(2, 3)), (torch.ones(2),)),
        (
            "list[Shaped[Tensor, '_rows *axes']]",
            [torch.ones(1, 3), torch.ones(2, 3)],
            [torch.ones(1, 3), torch.ones(4)],
        ),
        ("Sequence[Float[Tensor, 'a']]", (torch.ones(2), torch.ones(2)), (torch.ones(2), torch.ones(3))),
        ("Mapping[str, Float[Tensor, 'a']]", {"x": torch.ones(2)}, {"x": torch.ones(2, 2)}),
    ],
)
def test_tensors_in_containers_are_checked(hint: str, right: Any, wrong: Any) -> None:
    import collections.abc

    import jaxtyping

    def function(value: Any) -> None: ...

    function.__annotations__["value"] = hint
    strict = checked(
        function, {**vars(jaxtyping), **vars(collections.abc), "Tensor": torch.Tensor, "Float": jaxtyping.Float}
    )
    strict(right)
    with pytest.raises(ShapeError):
        strict(wrong)
