"""A layout that does not fit is refused with the setting to change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from minitron_megatron.errors import TopologyError
from minitron_megatron.parallel import Topology
from minitron_megatron.parallel import topology as module
from minitron_megatron.parallel.replicas import check_independent_replicas


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            Topology(tp=2, pp=3),
            "tp=2 x pp=3 needs a multiple of 6 processes, not 4. Start 6 of them: launch/local.sh 6 run RECIPE.",
        ),
        (
            Topology(tp=2, cp=4),
            "tp=2 x pp=1 x cp=4 needs a multiple of 8 processes, not 4. Start 8 of them: launch/local.sh 8 run RECIPE.",
        ),
        (
            Topology(pp=2, ep=4),
            "ep=4 needs a multiple of 4 processes in each pipeline stage, not 2. Start 8 of them, or set ep to a "
            "divisor of 2.",
        ),
        (Topology(vp=2), "vp=2 needs pp of 2 or more. Set vp to 1."),
        (Topology(sequence_parallel=True), "`sequence_parallel` has no effect at tp=1. Set it to false."),
    ],
)
def test_a_layout_that_does_not_fit_four_processes(layout: Topology, said: str) -> None:
    with pytest.raises(TopologyError) as caught:
        layout.check(4)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            Topology(ep=2),
            "ep=2 spreads experts over data-parallel replicas, which cannot work independently then. Set ep to 1.",
        ),
        (
            Topology(cp=2),
            "cp=2 shares sequences among data-parallel replicas, which cannot work independently then. Set cp to 1.",
        ),
    ],
)
def test_replicas_that_share_work_are_not_independent(layout: Topology, said: str) -> None:
    with pytest.raises(TopologyError) as caught:
        check_independent_replicas(layout)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((2, 1, 1), "mcore's context parallelism is not supported. Set context_parallel_size to 1."),
        (
            (1, 2, 2),
            "experts split by tensor parallelism are not supported. Set expert_tensor_parallel_size to 1.",
        ),
    ],
)
def test_a_layout_of_mcores_that_is_not_supported(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int], said: str
) -> None:
    names = ("context", "expert_model", "expert_tensor")
    state = {f"get_{name}_parallel_world_size": lambda size=size: size for name, size in zip(names, sizes, strict=True)}
    monkeypatch.setattr(module, "_state", lambda: SimpleNamespace(**state))
    with pytest.raises(TopologyError) as caught:
        Topology.running()
    assert str(caught.value) == said
