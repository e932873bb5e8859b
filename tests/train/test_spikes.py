"""A spike is counted once and does not hide the next."""

from __future__ import annotations

from minitron_megatron.train.spikes import Spikes


def seen(losses: list[float]) -> list[int]:
    """Return the positions of the spikes."""
    spikes = Spikes()
    return [at for at, loss in enumerate(losses) if spikes.see(loss)]


FALLING = [5.0 - 0.02 * step + 0.01 * (step % 3) for step in range(100)]


def test_a_loss_far_above_is_a_spike() -> None:
    losses = [*FALLING]
    losses[40] = losses[41] = 7.0
    assert seen(losses) == [40, 41]


def test_noise_and_a_slow_rise_are_none() -> None:
    assert seen(FALLING) == []
    assert seen([3.0] * 30 + [3.1] * 30) == []
    assert seen([3.0 + 0.002 * step for step in range(100)]) == []


def test_nothing_is_known_at_the_start() -> None:
    assert seen([3.0] * 10 + [30.0]) == []
    assert seen([3.0] * 16 + [30.0]) == [16]


def test_what_was_seen_goes_on_in_another() -> None:
    spikes = Spikes()
    for loss in FALLING[:50]:
        spikes.see(loss)
    again = Spikes(spikes.losses, spikes.count)
    assert again.see(9.0) and again.count == 1
