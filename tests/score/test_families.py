"""The other families are scored as transformers computes them: norms of heads, LayerNorm1p, an MLP without a gate."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from minitron_megatron.convert import load_hf, read_config
from minitron_megatron.parallel import Topology
from minitron_megatron.records import Scores, Statistic
from minitron_megatron.score import score
from minitron_megatron.testing import Pool
from tests.convert.conftest import make_folder
from tests.score.truth import SAMPLES, Seen, activations, expect_truth, truth
from tests.tiny import LAYOUTS, each_layout, samples, share

NINE = [Statistic(batch, sequence) for batch, sequence in product(("l2", "mean", "var"), repeat=2)]
FAMILIES = {
    "qwen3-tied": [Statistic(), Statistic(heads="norm_first")],
    "nemotron": [Statistic(), Statistic(neurons="pre"), Statistic("mean", "var", "pre", "norm_first")],
}
"""Kind -> statistics scored at every layout; on one process all nine are scored too."""
LAYERS = 5


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Seen]:
    folder = make_folder(tmp_path_factory.mktemp("families") / request.param, request.param, num_hidden_layers=LAYERS)
    return request.param, folder, activations(folder, samples(SAMPLES))


def sweep(topology: Topology, folder: Path, statistics: list[Statistic]) -> list[Scores]:
    model, batches = load_hf(folder, topology), share(samples(SAMPLES), topology, 3)
    return [score(model, batches, topology=topology, statistic=statistic) for statistic in statistics]


@each_layout
def test_scores_are_the_naive_truth(pool: Pool, family: tuple[str, Path, Seen], layout: str) -> None:
    kind, folder, seen = family
    statistics = FAMILIES[kind] + (NINE if layout == "tp1" else [])
    found, *_ = pool.run(sweep, folder, statistics, **LAYOUTS[layout])
    for statistic, scores in zip(statistics, found, strict=True):
        assert scores.statistic == statistic
        expect_truth(scores, truth(seen, statistic, read_config(folder).shape))
