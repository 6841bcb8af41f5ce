"""One request at the ingress: which tokens are accepted, which are journaled, which may be shown. Pure.

Theory of operation. Workers send (epoch, first index, tokens), more than once and from more than one worker: the prefill
worker sends the first token, the decode worker sends it again, a worker that reconnects replays what was not acknowledged.
A token is accepted when its epoch is the current one and its index is the next one. Lower indexes are compared and dropped,
an older epoch is stale. Tokens beyond a gap are not taken: what is missing is in Redis, or its worker sends it again.

A newer epoch takes over. Its first index is what the journal held when the epoch began, so what an older epoch sent from
there on was never journaled: it is dropped, except for tokens that were shown while Redis was away. Those stay, and a
newer epoch that disagrees with one of them has diverged, which ends the request.

    0 <= journaled <= visible <= accepted

    OPEN --last token--> COMPLETE --terminal in Redis--> ENDED
      ^                     |                              ^
      +--newer epoch--------+        OPEN ------end--------+

Clients see the outcome of a COMPLETE stream early only when Redis is away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from orchestrator.domain.lifecycle import IllegalMove
from orchestrator.ingress.text import TextRules, TextStream
from protos.contract.errors import AutanError


class StreamState(StrEnum):
    """How far a stream is, as seen from Redis."""

    OPEN = "open"
    COMPLETE = "complete"  # the last token is here, the request is not terminal in Redis yet
    ENDED = "ended"


class StreamMove(StrEnum):
    """What can happen to a stream."""

    COMPLETE = "complete"
    REOPEN = "reopen"
    END = "end"


STREAM_MOVES: Mapping[tuple[StreamState, StreamMove], StreamState] = MappingProxyType(
    {
        (StreamState.OPEN, StreamMove.COMPLETE): StreamState.COMPLETE,
        (StreamState.COMPLETE, StreamMove.REOPEN): StreamState.OPEN,
        (StreamState.OPEN, StreamMove.END): StreamState.ENDED,
        (StreamState.COMPLETE, StreamMove.END): StreamState.ENDED,
    }
)


class FinishReason(StrEnum):
    """Why a sequence ended; the words of the journal."""

    STOP = "stop"
    LENGTH = "length"


class Verdict(StrEnum):
    """What became of one delivery."""

    TAKEN = "taken"  # at least one new token, or the finish
    KNOWN = "known"  # nothing new
    STALE = "stale"  # of an older epoch
    GAP = "gap"  # beyond the next index: not taken; see recovery
    DIVERGED = "diverged"  # a known token came again with another value
    INVALID = "invalid"  # a token outside the vocabulary
    ENDED = "ended"  # the stream has ended


@dataclass(frozen=True, slots=True)
class Delivery:
    """Tokens of one request from one worker. `finish` is set when the engine ended the request with the last of them."""

    epoch: int
    first_index: int
    token_ids: Sequence[int]
    finish: FinishReason | None = None
    logprobs: Sequence[bytes] = ()  # packed, one for each token, or none


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to a delivery."""

    verdict: Verdict
    new_tokens: int = 0
    duplicates: int = 0


@dataclass(frozen=True, slots=True)
class Ending:
    """How the sequence ended: after `num_tokens` tokens; `text` was held back until then."""

    reason: FinishReason
    num_tokens: int
    stop: str = ""
    text: str = ""


Outcome = Ending | AutanError


@dataclass(frozen=True, slots=True)
class Pending:
    """Accepted tokens that are not journaled."""

    epoch: int
    first_index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Visible tokens and the text that they release."""

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[bytes, ...] = ()  # packed, one for each token, empty where not known; none when not asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What limits a stream, from the request and the model."""

    max_tokens: int
    vocab_size: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # eos included unless it is ignored
    has_logprobs: bool = False


class RequestStream:
    """See the module. Bounded by `max_tokens`."""

    def __init__(self, request_id: str, bounds: Bounds, rules: TextRules | None, journal: Iterable[int] = (), epoch: int = 0):
        """`journal`: the tokens that Redis has already; `epoch`: its current one. They may complete the stream at once."""
        self.request_id = request_id
        self.epoch = epoch
        self.state = StreamState.OPEN
        self.unjournaled = False  # something was shown before it was journaled
        self._bounds = bounds
        self._rules = rules
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._logprobs: dict[int, bytes] = {}  # by index; those that are known
        self._text = TextStream(rules) if rules else None
        self._ending: Ending | None = None
        self._outcome: Outcome | None = None
        for token_id in journal:
            if self._ending is None:
                self._append(token_id)
        self._journaled = self._visible = len(self._tokens)
        self._close_if_journal_ends()

    @property
    def accepted(self) -> int:
        """Number of accepted tokens."""
        return len(self._tokens)

    @property
    def journaled(self) -> int:
        """Number of tokens that Redis has."""
        return self._journaled

    @property
    def visible(self) -> int:
        """Number of tokens that clients may see."""
        return self._visible

    @property
    def ending(self) -> Ending | None:
        """How the sequence ended, once the last token is accepted."""
        return self._ending

    @property
    def outcome(self) -> Outcome | None:
        """What clients are told after the visible tokens; None while the request runs."""
        return self._outcome

    def receive(self, delivery: Delivery) -> Receipt:
        """Takes what is new. Nothing changes unless the verdict is TAKEN, or a newer epoch took over."""
        if self.state is StreamState.ENDED:
            return Receipt(Verdict.ENDED)
        if delivery.epoch < max(self.epoch, 1):
            return Receipt(Verdict.STALE)
        if delivery.first_index > len(self._tokens):
            return Receipt(Verdict.GAP)
        ids = delivery.token_ids
        if ids and not (min(ids) >= 0 and max(ids) < self._bounds.vocab_size):
            return Receipt(Verdict.INVALID)
        if delivery.epoch > self.epoch:
            self.supersede(delivery.epoch, delivery.first_index)
        known = min(len(self._tokens) - delivery.first_index, len(ids))
        if list(ids[:known]) != self._tokens[delivery.first_index : delivery.first_index + known]:
            return Receipt(Verdict.DIVERGED)
        if self._ending is not None:
            return Receipt(Verdict.KNOWN, duplicates=known)
        taken = 0
        for place in range(known, len(ids)):
            if self._bounds.has_logprobs and delivery.logprobs:
                self._logprobs[delivery.first_index + place] = delivery.logprobs[place]
            self._append(ids[place])
            taken += 1
            if self._ending is not None or len(self._tokens) == self._bounds.max_tokens:
                break
        self._close_if_last(delivery, cut=known + taken < len(ids))
        news = taken or self._ending is not None
        return Receipt(Verdict.TAKEN if news else Verdict.KNOWN, new_tokens=taken, duplicates=known)

    def supersede(self, epoch: int, journaled: int) -> None:
        """A newer epoch began when the journal held `journaled` tokens. An epoch that is not newer changes nothing."""
        if epoch <= self.epoch or self.state is StreamState.ENDED:
            return
        self.epoch = epoch
        keep = max(self._visible, min(journaled, len(self._tokens)))
        if keep == len(self._tokens):
            return
        for index in range(keep, len(self._tokens)):
            self._logprobs.pop(index, None)
        del self._tokens[keep:], self._texts[keep:]
        if self._ending is not None:
            self._ending = None
            self._move(StreamMove.REOPEN)
        if self._rules is not None:
            self._text = TextStream(self._rules)
            for token_id in self._tokens:
                self._text.push(token_id)

    def pending(self, limit: int) -> Pending | None:
        """The next tokens to journal, at most `limit`; None when there are none."""
        if self.state is StreamState.ENDED or self._journaled == len(self._tokens):
            return None
        start = self._journaled
        return Pending(self.epoch, start, tuple(self._tokens[start : start + limit]))

    def backfill(self, journal: Sequence[int]) -> bool:
        """Takes in all tokens that Redis has of the request, at this epoch; False when they contradict what is here."""
        known = min(len(journal), len(self._tokens))
        if list(journal[:known]) != self._tokens[:known] or (self._ending is not None and len(journal) > known):
            return False
        for token_id in journal[known:]:
            if self._ending is None:
                self._append(token_id)
        if len(journal) > self._journaled:
            self.journaled_to(len(journal))
        if len(journal) == len(self._tokens):
            self._close_if_journal_ends()
        return True

    def journaled_to(self, next_index: int) -> None:
        """Redis holds all tokens below `next_index`. They may be shown. A lower value than before: Redis lost some."""
        self._journaled = min(max(next_index, 0), len(self._tokens))
        self._visible = max(self._visible, self._journaled)

    def release(self) -> None:
        """Redis is away: everything accepted may be shown, and so may the end."""
        if self.state is StreamState.ENDED:
            return
        if self._visible < len(self._tokens):
            self._visible = len(self._tokens)
            self.unjournaled = True
        if self._ending is not None and self._outcome is None:
            self._outcome = self._ending
            self.unjournaled = True

    def end(self, outcome: Outcome) -> None:
        """The request is terminal in Redis, or given up. An outcome that clients were told already stays."""
        self._move(StreamMove.END)
        if self._outcome is None:
            self._outcome = outcome

    def close(self, reason: FinishReason) -> Ending:
        """Redis says that no more tokens come: the last one that is here was the last one."""
        if self._ending is None:
            self._complete(reason)
        assert self._ending is not None
        return self._ending

    def read(self, cursor: int, limit: int) -> Chunk | None:
        """Visible tokens from `cursor` on, at most `limit`; None when there are none."""
        stop = min(self._visible, cursor + limit)
        if cursor >= stop:
            return None
        logprobs = tuple(self._logprobs.get(i, b"") for i in range(cursor, stop)) if self._bounds.has_logprobs else ()
        return Chunk(cursor, tuple(self._tokens[cursor:stop]), "".join(self._texts[cursor:stop]), logprobs)

    def _append(self, token_id: int) -> None:
        self._tokens.append(token_id)
        text, stop = self._text.push(token_id) if self._text else ("", None)
        self._texts.append(text)
        if stop is not None:
            self._complete(FinishReason.STOP, stop)

    def _close_if_journal_ends(self) -> None:
        """The worker that sampled the last token may be gone, and another one would continue behind it."""
        if not self._tokens or self._ending is not None:
            return
        if self._tokens[-1] in self._bounds.stop_token_ids and len(self._tokens) > self._bounds.min_tokens:
            self._complete(FinishReason.STOP)
        elif len(self._tokens) >= self._bounds.max_tokens:
            self._complete(FinishReason.LENGTH)

    def _close_if_last(self, delivery: Delivery, cut: bool) -> None:
        if self._ending is not None:
            return
        end = delivery.first_index + len(delivery.token_ids)
        if delivery.finish is not None and not cut and end == len(self._tokens):
            self._complete(delivery.finish)
        elif len(self._tokens) >= self._bounds.max_tokens:
            self._complete(FinishReason.LENGTH)

    def _complete(self, reason: FinishReason, stop: str | None = None) -> None:
        self._move(StreamMove.COMPLETE)
        held = self._text.flush() if self._text and stop is None else ""
        self._ending = Ending(reason, len(self._tokens), stop or "", held)

    def _move(self, move: StreamMove) -> None:
        try:
            self.state = STREAM_MOVES[self.state, move]
        except KeyError:
            raise IllegalMove(f"a stream that is {self.state} cannot {move}") from None
