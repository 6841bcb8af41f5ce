"""Tokens are sent in order, kept until acknowledged, and sent again after every break."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.contract.redis_names import unpack_tokens
from protos.contract.token_logprobs import MAX_PACKED_BYTES
from protos.wire import common
from workers.service.token_tail import LOGPROBS_PER_MESSAGE, MAX_TOKENS_PER_MESSAGE, TokenTail


def tail(base: int = 0) -> TokenTail:
    return TokenTail(request_id="r", epoch=1, address="g", base=base, sent=base)


actions = st.one_of(
    st.just(("put", 0)), st.just(("send", 0)), st.just(("break", 0)), st.tuples(st.just("ack"), st.integers(0, 40))
)


@given(st.lists(actions, max_size=60))
def test_an_ingress_that_journals_in_order_gets_every_token(steps: list[tuple[str, int]]) -> None:
    """The ingress accepts what continues its journal; whatever breaks, nothing is missing and nothing is invented."""
    one, journal, made = tail(3), [0, 1, 2], 3
    for kind, back in steps:
        if kind == "put":
            one.put(made, made)
            made += 1
        elif kind == "send" and one.has_news:
            message = one.message()
            ids = unpack_tokens(message.token_ids)
            assert ids == list(range(message.first_index, message.first_index + len(ids)))
            assert message.first_index <= len(journal), "a gap"
            journal += ids[len(journal) - message.first_index :]
        elif kind == "break":
            one.rewind()
        elif kind == "ack":
            one.acknowledge(max(0, len(journal) - back))
        assert one.base <= len(journal) <= made
        assert one.kept == list(range(one.base, made))
    one.rewind()
    while one.has_news:
        message = one.message()
        journal += unpack_tokens(message.token_ids)[len(journal) - message.first_index :]
    assert journal == list(range(made))


def test_the_finish_goes_with_the_last_token_and_again_after_a_break() -> None:
    one = tail()
    one.put(0, 5)
    one.finish = common.FINISH_REASON_LENGTH
    assert one.message().finish == common.FINISH_REASON_LENGTH
    assert not one.has_news
    one.acknowledge(1)
    one.rewind()
    assert one.has_news
    again = one.message()
    assert (again.first_index, again.token_ids, again.finish) == (1, b"", common.FINISH_REASON_LENGTH)


def test_a_long_tail_goes_in_parts_and_the_finish_in_the_last() -> None:
    one = tail()
    for index in range(MAX_TOKENS_PER_MESSAGE + 1):
        one.put(index, 1)
    one.finish = common.FINISH_REASON_STOP
    first, second = one.message(), one.message()
    assert len(first.token_ids) == 4 * MAX_TOKENS_PER_MESSAGE and first.finish == common.FINISH_REASON_UNSPECIFIED
    assert second.first_index == MAX_TOKENS_PER_MESSAGE and second.finish == common.FINISH_REASON_STOP
    assert not one.has_news


def test_a_gap_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        tail().put(1, 5)


def test_a_suspended_tail_has_no_news() -> None:
    one = tail()
    one.put(0, 5)
    one.suspended = True
    assert not one.has_news


def test_logprobs_go_with_their_tokens_and_are_counted() -> None:
    one = tail()
    for index in range(5):
        one.put(index, index, bytes([index]) * (4 if index else 0))
    message = one.message()
    assert list(message.logprobs) == [b"", *(bytes([index]) * 4 for index in range(1, 5))]
    assert one.logprobs_bytes == 16
    assert one.acknowledge(3) == 3
    assert one.logprobs_bytes == 8
    one.rewind()
    assert list(one.message().logprobs) == [b"\3" * 4, b"\4" * 4]


def test_a_message_with_logprobs_stays_small() -> None:
    one = tail()
    for index in range(LOGPROBS_PER_MESSAGE + 10):
        one.put(index, 7, bytes(MAX_PACKED_BYTES))
    first, second = one.message(), one.message()
    assert (len(first.logprobs), len(second.logprobs)) == (LOGPROBS_PER_MESSAGE, 10)
    assert len(unpack_tokens(first.token_ids)) == LOGPROBS_PER_MESSAGE
    assert first.ByteSize() < 512 * 1024
