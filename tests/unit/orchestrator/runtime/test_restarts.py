"""Back-off and circuit breaker."""

from __future__ import annotations

import pytest

from orchestrator.runtime.restarts import RestartRecord, RestartRules

RULES = RestartRules(first_s=0.2, last_s=5.0, calm_s=30.0, window_s=60.0, deaths=100, cool_down_s=30.0)


@pytest.mark.parametrize(("jitter", "factor"), [(0.0, 0.5), (1.0, 1.0)])
def test_waits_double_up_to_a_bound_and_jitter_is_half_of_them(jitter: float, factor: float) -> None:
    record = RestartRecord(RULES)
    waits = [record.died(float(at), 0.1, jitter) for at in range(8)]
    assert waits == pytest.approx([factor * wait for wait in (0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0)])
    assert record.total == 8


def test_a_long_life_starts_with_a_clean_record() -> None:
    record = RestartRecord(RULES)
    for at in range(5):
        record.died(float(at), 0.1, 1.0)
    assert record.died(100.0, 30.0, 1.0) == pytest.approx(0.2)


def test_the_breaker_opens_lets_one_try_and_closes_after_a_calm_life() -> None:
    record = RestartRecord(RestartRules(deaths=3, window_s=60.0, cool_down_s=30.0, calm_s=30.0))
    assert record.died(0.0, 0.1, 0.0) < 1
    assert record.died(1.0, 0.1, 0.0) < 1
    assert 15 <= record.died(2.0, 0.1, 0.0) <= 30
    assert record.is_open
    assert record.died(200.0, 0.1, 0.0) >= 15, "the one try died as well"
    assert record.died(300.0, 31.0, 0.0) < 1
    assert not record.is_open


def test_deaths_outside_the_window_do_not_count() -> None:
    record = RestartRecord(RestartRules(deaths=3, window_s=10.0))
    for at in range(10):
        record.died(20.0 * at, 1.0, 0.0)
    assert not record.is_open


def test_a_hundred_thousand_deaths_are_no_overflow() -> None:
    record = RestartRecord(RULES)
    assert all(record.died(float(at * 1000), 0.0, 1.0) <= 5.0 for at in range(100_000))
