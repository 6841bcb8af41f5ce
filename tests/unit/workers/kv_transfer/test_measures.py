"""Which part of the transfer time lies before a moment."""

from __future__ import annotations

import pytest

from workers.kv_transfer.measures import Measures


def test_a_span_counts_up_to_the_moment() -> None:
    measures = Measures()
    measures.spent(1.0, 2.0)
    measures.spent(3.0, 5.0)
    assert measures.busy_s == 3.0
    expected = {0.5: 0.0, 1.5: 0.5, 2.5: 1.0, 4.5: 2.5, 9.0: 3.0}
    assert {moment: measures.busy_before_s(moment) for moment in expected} == pytest.approx(expected)
