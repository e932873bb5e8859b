"""Page of a rehearsal: memory over time, and time by line of code as nested blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minitron_megatron.files import read_json
from minitron_megatron.rehearsal import RankKind, Rehearsal, Section
from minitron_megatron.rehearsal.ledger import Sums
from minitron_megatron.rehearsal.rehearse import RankResult
from minitron_megatron.rehearsal.timeline import MOST, Timeline
from minitron_megatron.report import write_rehearsal

LINES = {
    "losses/fused.py:278": 3.0,
    "losses/fused.py:281": 1.0,
    "backward of megatron transformer/mlp.py:224 < parallel/mcore_compat.py:88": 2.0,
    "allreduce in 8, parallel/collectives.py:66": 4.0,
}


def found() -> Rehearsal:
    section = Section(peak=3 * 2**30, seconds=Sums(LINES), by_resource=Sums(memory=10.0), elapsed=2.0)
    for seconds, size in ((1.0, 2**30), (2.0, 3 * 2**30)):
        section.timeline.add(seconds, size)
    rank = RankResult(RankKind(0, "tp 1 of 8 <a>"), section, Section(), None, 1.0)
    return Rehearsal("distill", 8, "H100", 80.0, (rank,), 10.0, 1, 4096, 1e15)


def test_the_page_holds_both_pictures_and_says_that_they_are_modelled(tmp_path: Path) -> None:
    page = write_rehearsal(found().detailed(), tmp_path / "new" / "folder")
    text, numbers = page.read_text(), read_json(page.with_name("rehearsal.json"))
    assert numbers["ranks"][0]["seconds_by_line"] == LINES
    assert numbers["ranks"][0]["bytes_over_seconds"] == [[1.0, 2**30], [2.0, 3 * 2**30]]
    assert text.count("<figure>") == 2 and "modelled, not measured" in text
    assert "<a>" not in text and "tp 1 of 8 &lt;a&gt;" in text
    memory = read_json(page.with_name("memory.charts.json"))[0]
    assert (memory["data"][0]["x"], memory["data"][0]["y"]) == ([1.0, 2.0], [1.0, 3.0])
    assert len(memory["data"]) == 1  # a line at 80 GiB would flatten the others


def test_a_stage_without_tokens_has_its_time_alone(tmp_path: Path) -> None:
    training = found()
    cut = replace(training, stage="prune", tokens=0, model_flops=None)
    for each, has in ((training, True), (cut, False)):
        text = write_rehearsal(each.detailed(), tmp_path).read_text()
        assert "10.0 s" in text and ("tokens per second" in text) == has


def test_blocks_lie_in_those_of_their_file_and_work(tmp_path: Path) -> None:
    chart = read_json(write_rehearsal(found().detailed(), tmp_path).with_name("time.charts.json"))[0]["data"][0]
    blocks = dict(zip(chart["ids"], zip(chart["parents"], chart["values"], strict=True), strict=True))
    assert blocks.pop("all") == ("", 0)
    assert {each for each, (parent, _) in blocks.items() if parent == "all"} == {
        *("forward and optimizer", "backward", "communication")
    }
    fused = "forward and optimizer\tlosses/fused.py"
    assert blocks[f"{fused}\tlosses/fused.py:278"] == (fused, 3.0)
    assert blocks[fused] == ("forward and optimizer", 0)
    assert "backward\tmegatron transformer/mlp.py" in blocks and "communication\tparallel/collectives.py" in blocks
    assert sum(seconds for _, seconds in blocks.values()) == sum(LINES.values())
    assert any("&lt; parallel" in label for label in chart["labels"])


def test_a_long_timeline_keeps_its_peak_and_its_end() -> None:
    timeline, kernels = Timeline(), 5 * MOST + 3
    for kernel in range(kernels):
        timeline.add(float(kernel), 10**6 if kernel == 777 else kernel)
    points = timeline.finished(float(kernels))
    assert MOST <= len(points) <= 2 * MOST
    assert max(size for _, size in points) == 10**6
    assert [seconds for seconds, _ in points] == sorted(seconds for seconds, _ in points)
    assert points[-1] == (float(kernels), kernels - 1)
