"""The planner's benchmark compares like with like; no figure is asserted."""

from __future__ import annotations

from orchestrator.costs.accuracy import Errors
from tests.bench.bench_planner import rows_of


def test_the_peer_stands_beside_the_same_quantity_alone() -> None:
    numbers = {
        "tpot_mape": 0.1,
        "tpot_median": 0.05,
        "tpot_bias": -0.01,
        "ttft_mape": 0.24,
        "ttft_median": 0.2,
        "ttft_bias": 0.1,
    }
    rows = {one.metric: one for one in rows_of(Errors(label="all points", points=3, **numbers))}
    assert rows["TTFT MAPE, model left out"].ratio == 0.5
    assert rows["TPOT MAPE, model left out"].peer_value == 20.0
    assert rows["TPOT median, model left out"].ratio is None
    assert all(one.ratio is None for one in rows_of(Errors(label="qwen3-32b", points=3, **numbers)))
