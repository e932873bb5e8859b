"""Memory and load of the machine are logged at intervals, with plausible values."""

from __future__ import annotations

import psutil
import pytest
import torch

from minitron_megatron.errors import Preempted
from minitron_megatron.events import Event
from minitron_megatron.report import Machine


def test_it_tells_every_so_many_seconds_and_only_beside_measurements() -> None:
    told: list[Event] = []
    now = 1000.0
    machine = Machine(told.append, every=30.0, clock=lambda: now)
    machine(Event("score", 1, 9))
    for step in range(7):
        machine(Event("distill", step, 9, values={"loss": 1.0}))
        now += 10.0
    assert [(event.label, event.done) for event in told] == [("machine", 1000), ("machine", 1030), ("machine", 1060)]
    for event in told:
        assert 0 <= event.values["host_load"] <= 1
        assert all(0 < event.values[name] < psutil.virtual_memory().total for name in ("process_bytes", "host_bytes"))


class NVMLError_NotSupported(Exception):
    """pynvml's error for parts of a GPU: nothing that torch raises itself."""


def refuses() -> float:
    raise NVMLError_NotSupported


def interrupts() -> float:
    raise Preempted


def test_what_a_gpu_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Event] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (300, 1000))
    monkeypatch.setattr(torch.cuda, "utilization", refuses)
    Machine(told.append)(Event("distill", 1, 9, values={"loss": 1.0}))
    assert told[0].values["gpu_bytes"] == 700
    assert "gpu_load" not in told[0].values
    monkeypatch.setattr(torch.cuda, "utilization", interrupts)  # a signal may come at any time
    with pytest.raises(Preempted):
        Machine(told.append)(Event("distill", 1, 9, values={"loss": 1.0}))
