"""How far a stream has come, over several connections. Pure."""

from __future__ import annotations

from orchestrator.client.messages import Accepted, Delta, Event, Finished


class Progress:
    """Leaves out what came before, choice by choice. The same tokens have the same text, however they are cut."""

    def __init__(self, from_index: int, choices: int) -> None:
        self._next = [from_index] * choices
        self._shown_chars = [0] * choices  # of all connections
        self._seen_chars = [0] * choices  # of the present connection
        self._announced: set[int] = set()
        self._finished: set[int] = set()

    @property
    def next_index(self) -> int:
        """The index from which a single choice is resumed."""
        return self._next[0]

    @property
    def is_announced(self) -> bool:
        """True when the cluster has accepted something of the request."""
        return bool(self._announced)

    @property
    def is_resumable(self) -> bool:
        """True when Resume goes on with the request: it is accepted, and has one choice."""
        return len(self._next) == 1 and self.is_announced

    @property
    def is_over(self) -> bool:
        """True when every choice has finished."""
        return len(self._finished) == len(self._next)

    def connect(self) -> None:
        """A connection begins: behind what is known if the stream is resumable, else at the beginning of every choice."""
        self._seen_chars = list(self._shown_chars) if self.is_resumable else [0] * len(self._next)

    def take(self, event: Event) -> Event | None:
        """The event without what is known already; None when nothing of it is new."""
        match event:
            case Accepted():
                is_new = event.choice not in self._announced
                self._announced.add(event.choice)
                return event if is_new else None
            case Delta():
                return self._rest(event)
            case Finished():
                is_new = event.choice not in self._finished
                self._finished.add(event.choice)
                return event if is_new else None

    def _rest(self, delta: Delta) -> Delta | None:
        choice = delta.choice
        known = max(0, self._next[choice] - delta.first_index)
        text = delta.text[max(0, self._shown_chars[choice] - self._seen_chars[choice]) :]
        self._seen_chars[choice] += len(delta.text)
        self._shown_chars[choice] = max(self._shown_chars[choice], self._seen_chars[choice])
        if known >= len(delta.token_ids):
            return None
        self._next[choice] = delta.first_index + len(delta.token_ids)
        return Delta(delta.first_index + known, delta.token_ids[known:], text, delta.logprobs[known:], choice)
