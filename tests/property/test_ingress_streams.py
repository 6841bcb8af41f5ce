"""The stream state machine against a reference: whatever order messages come in, what is shown is right, in order, once.

The model keeps Redis beside the stream: a journal that only grows, and an epoch at which it is frozen when a new one begins.
Emits are on their way for as long as they like: they take effect later or never, their replies may be lost, and the stream
that sent one may have been replaced by another one of the same request meanwhile.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.domain.lifecycle import IllegalMove
from orchestrator.ingress.streams import (
    STREAM_MOVES,
    Bounds,
    Chunk,
    Delivery,
    Ending,
    FinishReason,
    Pending,
    RequestStream,
    StreamMove,
    StreamState,
    Verdict,
)
from orchestrator.ingress.text import TextRules
from orchestrator.ingress.tokenizer import ByteTokenizer
from protos.contract.errors import EngineFailure

LENGTH = 12
REFERENCE = [3 + byte for byte in "na\u00efve \U0001f680!".encode()][:LENGTH]
BOUNDS = Bounds(max_tokens=LENGTH, vocab_size=259)
RULES = TextRules(ByteTokenizer().detokenizer)


def a_stream(**fields: object) -> RequestStream:
    return RequestStream("r-1", BOUNDS, RULES, **fields)  # type: ignore[arg-type]


class Interleavings(RuleBasedStateMachine):
    """Workers of several epochs, a journal that comes and goes, one client that reads by cursor."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = a_stream()
        self.redis: list[int] = []
        self.epoch = 0
        self.starts = {0: 0}  # first index of each epoch: what the journal held when it began
        self.under_way: list[tuple[RequestStream, Pending]] = []
        self.forgotten = {0: 0}  # by epoch: what its worker does not send again, because it was acknowledged
        self.read: list[int] = []
        self.text = ""

    @rule()
    def assign(self) -> None:
        if self.stream.state is not StreamState.ENDED:
            self.epoch += 1
            self.starts[self.epoch] = self.forgotten[self.epoch] = len(self.redis)

    @precondition(lambda self: self.epoch > 0)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """A move is over: the epoch of its target began with what was journaled when it was opened."""
        if self.stream.state is not StreamState.ENDED:
            start = data.draw(st.integers(self.starts[self.epoch], len(self.redis)))
            self.epoch += 1
            self.starts[self.epoch] = self.forgotten[self.epoch] = start

    @precondition(lambda self: self.epoch > 0)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        epoch = data.draw(st.just(self.epoch) | st.integers(1, self.epoch))
        kept = self.forgotten[epoch]
        first = data.draw(st.just(max(kept, min(self.stream.accepted, LENGTH))) | st.just(kept) | st.integers(kept, LENGTH))
        end = data.draw(st.integers(first, LENGTH))
        before, state = self.stream.accepted, self.stream.state
        known_epoch = self.stream.epoch
        receipt = self.stream.receive(
            Delivery(epoch, first, REFERENCE[first:end], FinishReason.LENGTH if end == LENGTH else None)
        )
        assert receipt.verdict not in (Verdict.DIVERGED, Verdict.INVALID), "an honest worker never diverges"
        if epoch < known_epoch:
            assert receipt.verdict in (Verdict.STALE, Verdict.ENDED) and self.stream.accepted == before
        elif first > before:
            assert receipt.verdict in (Verdict.GAP, Verdict.ENDED)
        elif state is not StreamState.ENDED:
            assert self.stream.accepted >= end, "a worker that leaves no gap is always taken"

    @precondition(lambda self: self.epoch > 0)
    @rule(first=st.integers(0, LENGTH), wrong=st.integers(-5, 400))
    def deliver_rubbish(self, first: int, wrong: int) -> None:
        """A stale worker with other tokens, or one outside the vocabulary: nothing changes."""
        stale = self.stream.epoch - 1
        if stale >= 0:
            before = self.stream.accepted
            assert self.stream.receive(Delivery(stale, first, [wrong])).verdict in (Verdict.STALE, Verdict.ENDED)
            assert self.stream.accepted == before

    @rule(limit=st.integers(1, LENGTH), lost_reply=st.booleans())
    def commit(self, limit: int, lost_reply: bool) -> None:
        """One emit: Redis refuses a stale epoch, takes what is new, and the reply may be lost."""
        pending = self.stream.pending(limit)
        if pending is None:
            return
        if pending.epoch != self.epoch:
            self.stream.supersede(self.epoch, len(self.redis))
            return
        assert pending.first_index <= len(self.redis)
        fresh = pending.token_ids[len(self.redis) - pending.first_index :]
        self.redis += fresh
        if not lost_reply:
            self._told(self.stream)

    @precondition(lambda self: len(self.under_way) < 3)
    @rule(limit=st.integers(1, LENGTH))
    def send(self, limit: int) -> None:
        """An emit that is under way. A caller that waits no longer shows what it has (`redis_is_away`)."""
        pending = self.stream.pending(limit)
        if pending is not None:
            self.under_way.append((self.stream, pending))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), lost_reply=st.booleans())
    def arrive(self, data: st.DataObject, lost_reply: bool) -> None:
        """One of the emits reaches Redis, which checks epoch and place as autan_emit does."""
        self._arrives(*self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1))), lost_reply)

    def _arrives(self, sender: RequestStream, pending: Pending, lost_reply: bool) -> None:
        if pending.epoch != self.epoch or pending.first_index > len(self.redis):
            return
        self.redis += pending.token_ids[len(self.redis) - pending.first_index :]
        if lost_reply:
            sender.release()
        else:
            self._told(sender)

    def _told(self, sender: RequestStream) -> None:
        """The reply of an emit: a stream that knows how far the journal is acknowledges that to its worker."""
        sender.journaled_to(len(self.redis))
        self.forgotten[sender.epoch] = max(self.forgotten[sender.epoch], sender.journaled)

    @precondition(lambda self: self.stream.state is StreamState.OPEN)
    @rule(late=st.booleans(), lost_reply=st.booleans())
    def replaced(self, late: bool, lost_reply: bool) -> None:
        """The request is adopted from Redis, while what the stream before has sent is still under way, or comes just then."""
        before, pending = self.stream, self.stream.pending(LENGTH)
        self.stream = a_stream(journal=self.redis, epoch=self.epoch)
        if late and pending is not None:
            self._arrives(before, pending, lost_reply)

    @rule()
    def catch_up(self) -> None:
        if self.stream.state is not StreamState.ENDED:
            self.stream.supersede(self.epoch, len(self.redis))
            assert self.stream.backfill(self.redis), "honest workers agree with the journal"
            assert self.stream.accepted >= len(self.redis)

    @rule()
    def look(self) -> None:
        self.stream.supersede(self.epoch, len(self.redis))

    @rule()
    def redis_is_away(self) -> None:
        self.stream.release()

    @rule()
    def finish(self) -> None:
        ending = self.stream.ending
        if self.stream.state is StreamState.COMPLETE and self.epoch == self.stream.epoch and len(self.redis) == LENGTH:
            assert ending is not None and ending.num_tokens == LENGTH
            self.stream.journaled_to(LENGTH)
            self.stream.end(ending)

    @rule(limit=st.integers(1, 5))
    def client_reads(self, limit: int) -> None:
        chunk = self.stream.read(len(self.read), limit)
        if chunk is not None:
            assert chunk.first_index == len(self.read) and 1 <= len(chunk.token_ids) <= limit
            self.read += chunk.token_ids
            self.text += chunk.text

    @invariant()
    def counts_are_in_order(self) -> None:
        stream = self.stream
        assert 0 <= stream.journaled <= stream.visible <= stream.accepted <= LENGTH

    @invariant()
    def what_was_read_is_the_reference(self) -> None:
        assert self.read == REFERENCE[: len(self.read)]

    @invariant()
    def redis_has_the_reference(self) -> None:
        assert self.redis == REFERENCE[: len(self.redis)]

    @invariant()
    def nothing_is_shown_before_it_is_journaled_unless_marked(self) -> None:
        assert self.stream.visible <= len(self.redis) or self.stream.unjournaled

    @invariant()
    def the_outcome_comes_with_all_tokens(self) -> None:
        if self.stream.outcome is not None:
            assert self.stream.visible == LENGTH

    def teardown(self) -> None:
        """Left alone, every stream comes to its end, whatever its worker has forgotten."""
        self.assign() if self.epoch == 0 else None
        first = self.forgotten[self.epoch]
        replay = Delivery(self.epoch, first, REFERENCE[first:], FinishReason.LENGTH)
        if self.stream.receive(replay).verdict is Verdict.GAP:
            self.catch_up()
            assert self.stream.receive(replay).verdict is not Verdict.GAP, "what no worker has is in Redis"
        while self.stream.pending(5):
            self.commit(5, False)
        self.finish()
        assert self.stream.state is StreamState.ENDED
        while len(self.read) < LENGTH:
            self.client_reads(5)
        outcome = self.stream.outcome
        assert isinstance(outcome, Ending) and outcome.reason is FinishReason.LENGTH
        assert self.text + outcome.text == ByteTokenizer().decode(REFERENCE)


Interleavings.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestInterleavings = Interleavings.TestCase


def open_stream(tokens: int = 3) -> RequestStream:
    stream = a_stream()
    stream.receive(Delivery(1, 0, REFERENCE[:tokens]))
    stream.journaled_to(tokens)
    return stream


@pytest.mark.parametrize(
    ("delivery", "verdict"),
    [
        (Delivery(1, 3, REFERENCE[3:5]), Verdict.TAKEN),
        (Delivery(1, 0, REFERENCE[:3]), Verdict.KNOWN),
        (Delivery(1, 3, []), Verdict.KNOWN),
        (Delivery(0, 3, REFERENCE[3:5]), Verdict.STALE),
        (Delivery(1, 4, REFERENCE[4:5]), Verdict.GAP),
        (Delivery(1, 2, [5, 6]), Verdict.DIVERGED),
        (Delivery(2, 2, [5, 6]), Verdict.DIVERGED),
        (Delivery(1, 3, [259]), Verdict.INVALID),
        (Delivery(1, 3, [-1]), Verdict.INVALID),
        (Delivery(1, 3, [], FinishReason.STOP), Verdict.TAKEN),
    ],
)
def test_verdicts(delivery: Delivery, verdict: Verdict) -> None:
    stream = open_stream()
    assert stream.receive(delivery).verdict is verdict
    if verdict is not Verdict.TAKEN:
        assert (stream.accepted, stream.journaled, stream.state) == (3, 3, StreamState.OPEN)


def test_a_newer_epoch_replaces_what_was_neither_journaled_nor_shown() -> None:
    stream = open_stream(3)
    stream.receive(Delivery(1, 3, [50, 51, 52]))
    assert stream.receive(Delivery(2, 3, REFERENCE[3:5])).new_tokens == 2
    stream.journaled_to(5)
    assert stream.read(3, 9) == Chunk(3, tuple(REFERENCE[3:5]), "\u00efv")


def test_a_newer_epoch_that_contradicts_what_was_shown_diverges() -> None:
    stream = open_stream(3)
    stream.receive(Delivery(1, 3, [50]))
    stream.release()
    assert stream.receive(Delivery(2, 3, [51])).verdict is Verdict.DIVERGED
    assert stream.read(3, 9) == Chunk(3, (50,), stream.read(3, 9).text)  # type: ignore[union-attr]


def test_the_journal_brings_back_what_is_not_here_and_may_complete_the_stream() -> None:
    stream = open_stream(3)
    assert stream.receive(Delivery(1, 5, REFERENCE[5:7])).verdict is Verdict.GAP
    assert stream.backfill(REFERENCE[:5]) and (stream.accepted, stream.journaled, stream.visible) == (5, 5, 5)
    assert stream.receive(Delivery(1, 5, REFERENCE[5:7])).verdict is Verdict.TAKEN
    assert stream.backfill(REFERENCE[:4]) and (stream.accepted, stream.journaled) == (7, 5), (
        "an older reading takes nothing back"
    )
    assert stream.backfill(REFERENCE) and stream.state is StreamState.COMPLETE
    assert stream.ending is not None and stream.ending.reason is FinishReason.LENGTH


@pytest.mark.parametrize("journal", [[*REFERENCE[:2], 50], [50], [*REFERENCE, 9]])
def test_a_journal_that_contradicts_the_stream_changes_nothing(journal: list[int]) -> None:
    stream = open_stream(LENGTH if len(journal) > LENGTH else 3)
    before = stream.accepted
    assert not stream.backfill(journal)
    assert (stream.accepted, stream.journaled) == (before, before)


def test_more_tokens_than_were_asked_for_are_not_taken() -> None:
    stream = a_stream()
    receipt = stream.receive(Delivery(1, 0, [*REFERENCE, 9, 9], FinishReason.STOP))
    assert (receipt.new_tokens, stream.accepted) == (LENGTH, LENGTH)
    assert stream.ending == Ending(FinishReason.LENGTH, LENGTH, "", stream.ending.text if stream.ending else "")


@pytest.mark.parametrize(("last", "reason"), [(2, FinishReason.STOP), (9, None)])
def test_a_journal_that_ends_with_an_end_token_needs_no_worker(last: int, reason: FinishReason | None) -> None:
    bounds = Bounds(max_tokens=LENGTH, vocab_size=259, stop_token_ids=frozenset({2}))
    stream = RequestStream("r-1", bounds, RULES, [70, 71, last], epoch=4)
    assert (stream.ending.reason if stream.ending else None) is reason
    assert stream.visible == 3 and stream.epoch == 4


def test_illegal_moves_raise_and_change_nothing() -> None:
    stream = open_stream()
    stream.end(EngineFailure("broken"))
    for attempt in (lambda: stream.end(EngineFailure("again")), lambda: stream.close(FinishReason.STOP)):
        with pytest.raises(IllegalMove):
            attempt()
        assert stream.state is StreamState.ENDED and str(stream.outcome) == "broken" and stream.ending is None
    assert {move for _, move in STREAM_MOVES} == set(StreamMove)
    assert not [state for state, _ in STREAM_MOVES if state is StreamState.ENDED]
