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


def test_time_in_which_several_streams_send_passes_once() -> None:
    measures, now = Measures(), iter([1.0, 4.0, 6.0, 7.0])
    with measures.busy(lambda: next(now)):
        with measures.busy(lambda: next(now)):
            pass
        with measures.busy(lambda: next(now)):
            pass
    with measures.busy(lambda: next(now)):
        assert measures.busy_s == 3.0
    assert measures.busy_s == 4.0 and measures.spans_s == [(1.0, 4.0), (6.0, 7.0)]


def test_a_block_that_goes_out_again_counts_once() -> None:
    measures = Measures()
    measures.sent([0, 4])
    measures.sent([4, 8])
    assert measures.blocks == 3
