"""Memory and load of the machine are logged at intervals, with plausible values."""

from __future__ import annotations

import psutil

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
