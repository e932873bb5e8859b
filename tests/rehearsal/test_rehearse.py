"""`rehearse` refuses by name what it cannot do, before any rank is rehearsed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.convert import read_config
from minitron_megatron.errors import MinitronError, RecipeError, TopologyError
from minitron_megatron.forecast import student_shape
from minitron_megatron.layout import flops_per_token
from minitron_megatron.recipe import load_recipe
from minitron_megatron.rehearsal import Ledger, RankKind, Rehearsal, Section, rehearse
from minitron_megatron.rehearsal.kernels import attention_flops
from minitron_megatron.rehearsal.ledger import Sums
from minitron_megatron.rehearsal.rehearse import RankResult, _flops_per_token
from minitron_megatron.rehearsal.stages import rehearsable
from minitron_megatron.rehearsal.stand_in import _expect, cuda_stand_in

Write = Callable[..., Path]
GIB = 2**30


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"gpus": 3}, TopologyError, "3"),
        (
            {"gpus": 2, "stage": "align"},
            RecipeError,
            r"^the stage 'align' cannot be rehearsed\. Give --stage correct, score, search, prune, distill, evaluate, "
            r"generate or export\.$",
        ),
        ({"gpus": 2, "gpu": "H10"}, RecipeError, "the GPU 'H10' is not known"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(
    options: dict[str, Any], error: type[MinitronError], words: str, recipe_file: Write
) -> None:
    with pytest.raises(error, match=words):
        rehearse(load_recipe(recipe_file(parallel={"tp": 2})), **options)


def test_what_does_not_fit_names_the_rank_the_excess_and_the_largest_bytes() -> None:
    full = Section(peak=3 * GIB, peak_by_kind=Sums(weights=1.0 * GIB, optimizer=2.0 * GIB), over="bf16 [9] at a.py:1")
    results = [
        RankResult(RankKind(rank, name), section, Section(), None, 1.0)
        for rank, name, section in ((0, "tp 1 of 2", Section(peak=GIB)), (1, "tp 2 of 2", full))
    ]
    found = Rehearsal("distill", 2, "H100", 2.5, tuple(results), 1.0, 1, 1, None)
    with pytest.raises(TopologyError) as error:
        found.expect_to_fit()
    text = str(error.value)
    assert text.startswith("tp 2 of 2 needs 3.00 GiB (modelled, not measured), 0.50 GiB more than the 2.5 GiB of a GPU")
    assert "bf16 [9] at a.py:1; largest: optimizer 2.00 GiB, weights 1.00 GiB" in text


@pytest.mark.parametrize(("objective", "passes_of_the_teacher"), [("distillation", 1), ("cross_entropy", 0)])
def test_utilisation_counts_the_models_that_are_there(
    objective: str, passes_of_the_teacher: int, recipe_file: Write
) -> None:
    recipe = load_recipe(recipe_file(), [f"distill.objective={objective}"])
    teacher, sequence = read_config(recipe.model).shape, recipe.data.sequence
    of_teacher, of_student = (flops_per_token(each, sequence) for each in (teacher, student_shape(recipe, teacher)))
    assert _flops_per_token(recipe, "distill") == 3 * of_student + passes_of_the_teacher * of_teacher
    assert _flops_per_token(recipe, "correct") == 3 * of_teacher


def test_a_torch_for_cuda_is_refused_with_the_build_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    with pytest.raises(TopologyError) as caught, cuda_stand_in():
        pass
    assert str(caught.value) == (
        "this torch is built for CUDA, and a rehearsal needs a build for CPUs alone. Rehearse where `pip install torch "
        "--index-url https://download.pytorch.org/whl/cpu` was used, such as on a laptop."
    )


def test_a_torch_with_other_tables_names_the_versions_that_work() -> None:
    function = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(lambda thing: 3)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    _expect(address, 0, 3)
    with pytest.raises(TopologyError) as caught:
        _expect(address, 0, 1)
    assert str(caught.value) == (
        f"torch {torch.__version__} has other tables of devices than a rehearsal knows (3 is not 1). Use the versions "
        "in constraints.txt."
    )


def test_a_stage_that_the_recipe_lacks_is_refused(recipe_file: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        rehearsable(load_recipe(recipe_file(correct=None)), "correct")
    assert str(caught.value) == "this recipe does not use the stage correct. Give another --stage."


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_attention_of_the_pieces_of_a_sequence_is_that_of_the_whole(kernel: str) -> None:
    """Queries at the last keys, as context parallelism has them; a mask spares nothing."""
    name = f"_scaled_dot_product_{kernel}_attention"

    def flops(queries: int, keys: int, *, causal: bool = True, backward: bool = False) -> int:
        q, k = torch.empty(2, 4, queries, 8), torch.empty(2, 4, keys, 8)
        before = {"flash": (0.0,), "efficient": (None, True, 0.0)}[kernel]
        args = (q, q, k, k, *[None] * 7, causal) if backward else (q, k, k, *before, causal)
        return attention_flops(name + "_backward" * backward, args)

    for backward in (False, True):
        whole = flops(8, 8, backward=backward)
        assert flops(4, 4, backward=backward) + flops(4, 8, backward=backward) == whole
        assert flops(8, 8, causal=False, backward=backward) == 2 * whole
    assert flops(8, 8) == 2 * 2 * 2 * 4 * 8 * 8 * 8 // 2  # two products of two operations, and half of the square
    assert 2 * flops(8, 8, backward=True) == 5 * flops(8, 8)


def test_only_the_wait_for_a_collective_takes_time() -> None:
    ledger = Ledger()
    early, behind, elsewhere = (ledger.start_collective(*each) for each in (("a", 3.0), ("a", 1.0), ("b", 2.0)))
    ledger.spend(2.5)
    assert [early(), elsewhere(), behind(), behind()] == [0.5, 0.0, 1.0, 0.0]
    assert ledger.section.elapsed == 4.0
