"""Input, command and report of trtllm-bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import DataError
from minitron_megatron.serve import SERVERS, Measured, Workload, measure_locally, write_requests

command, parse_report = SERVERS["trtllm"].command, SERVERS["trtllm"].parse_report
REPORT: dict[str, Any] = {
    "engine": {"model": "m", "backend": "Pytorch", "dtype": "bfloat16", "kv_cache_dtype": "FP8", "version": "1.2.1"},
    "world_info": {"tp_size": 2, "pp_size": 1, "world_size": 2, "max_batch_size": 32},
    "request_info": {"num_requests": 64, "avg_input_length": 128.0, "avg_output_length": 128.0},
    "performance": {
        "request_throughput_req_s": 40.5,
        "system_output_throughput_tok_s": 5184.0,
        "system_total_throughput_tok_s": 10368.0,
        "output_throughput_per_gpu_tok_s": 2592.0,
        "total_latency_ms": 1580.2,
        "avg_request_latency_ms": 790.1,
        "request_latency_percentiles_ms": {"p50": 780.0},
    },
    "streaming_metrics": {"avg_ttft_ms": 21.5, "avg_tpot_ms": 6.0},
}


WORKLOAD = Workload(inputs=5, outputs=7, batch=2, requests=3)


def written(path: Path, report: Any) -> Path:
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    return path


def test_a_report_is_read(tmp_path: Path) -> None:
    assert parse_report(written(tmp_path / "r.json", REPORT), WORKLOAD) == Measured(5184.0, 40.5, 790.1, 21.5, 6.0, 2)


def test_an_older_report_gives_what_it_has(tmp_path: Path) -> None:
    older = {"performance": {"output_throughput_tok_s": 100, "avg_request_latency_ms": "n/a"}, "world_info": None}
    assert parse_report(written(tmp_path / "r.json", older), WORKLOAD) == Measured(100.0, None, None, None, None, None)


@pytest.mark.parametrize("broken", ["{", "[]", '{"engine": {}}', '"x"', '{"performance": 3}', '{"performance": {}}'])
def test_what_is_no_report_is_one_message(tmp_path: Path, broken: str) -> None:
    with pytest.raises(DataError, match="is not a report of trtllm-bench"):
        parse_report(written(tmp_path / "r.json", broken), WORKLOAD)
    with pytest.raises(DataError, match="is not a report of trtllm-bench"):
        parse_report(tmp_path / "none.json", WORKLOAD)


def test_requests_and_the_command_are_as_documented(tmp_path: Path) -> None:
    write_requests(tmp_path / "d.jsonl", WORKLOAD, vocab=11)
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert [line["task_id"] for line in lines] == [0, 1, 2]
    assert all(len(line["input_ids"]) == 5 and line["output_tokens"] == 7 for line in lines)
    assert all(0 <= token < 11 for line in lines for token in line["input_ids"])
    evil = Path("a b/$(touch x)")
    call = command(evil, tmp_path / "d.jsonl", tmp_path / "r.json", WORKLOAD, tp=2)
    assert call[:2] == ["trtllm-bench", "--model"] and call[2] == evil.name and call[4] == str(evil)
    for pair in (
        ("--concurrency", "2"),
        ("--tp", "2"),
        ("--backend", "pytorch"),
        ("--report_json", str(tmp_path / "r.json")),
    ):
        assert call[call.index(pair[0]) + 1] == pair[1]
    assert "--streaming" in call


def test_two_models_are_measured_in_turn(tmp_path: Path) -> None:
    from tests.tiny import SHAPES, write_llama

    folders = [write_llama(tmp_path / name, SHAPES[name], 1) for name in ("untied", "student")]
    found = measure_locally(folders, Workload(inputs=4, outputs=5, batch=2, requests=2), repeats=2)
    assert len(found) == 2
    for each in found:
        assert each.tokens_per_second and each.first_token_ms and each.token_ms and each.latency_ms
        assert each.latency_ms == pytest.approx(each.first_token_ms + 4 * each.token_ms)
        assert each.tokens_per_second == pytest.approx(2 * 5 / (each.latency_ms / 1000))
