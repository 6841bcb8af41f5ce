"""Replies of the library as values. A reply of another shape is a bug or a foreign library: InternalError."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from orchestrator.store import replies
from protos.contract.errors import InternalError, NotLeader
from protos.contract.redis_names import Code

Raw = bytes | int
T = TypeVar("T")


class Cursor:
    """Reads a flat reply from left to right."""

    def __init__(self, name: str, reply: object) -> None:
        if not isinstance(reply, list) or not reply:
            raise InternalError(f"{name}: the store replied {type(reply).__name__}, not an array")
        self._name = name
        self._values: Iterator[Raw] = iter(reply)

    def raw(self) -> Raw:
        """The next value. Raises InternalError behind the last."""
        for value in self._values:
            return value
        raise InternalError(f"{self._name}: the store's reply is too short; is another version of the library loaded?")

    def number(self) -> int:
        """The next value as an integer; 0 for an empty one."""
        value = self.raw()
        try:
            return int(value) if value != b"" else 0
        except (TypeError, ValueError) as error:
            raise InternalError(f"{self._name}: {value!r} where a number belongs") from error

    def blob(self) -> bytes:
        """The next value as bytes."""
        value = self.raw()
        return value if isinstance(value, bytes) else str(value).encode()

    def text(self) -> str:
        """The next value as text."""
        return self.blob().decode("utf-8", "replace")

    def code(self) -> Code:
        """The next value as a code. Raises InternalError for an unknown one."""
        value = self.text()
        try:
            return Code(value)
        except ValueError as error:
            raise InternalError(f"{self._name}: unknown code {value!r}") from error

    def leading_code(self) -> Code:
        """The first code of a call that only the leader may make. Raises NotLeader."""
        code = self.code()
        if code is Code.NOT_LEADER:
            raise NotLeader(f"{self._name}: another core leads since")
        return code

    def many(self, read: Callable[[Cursor], T]) -> tuple[T, ...]:
        """A count, and as many values."""
        return tuple(read(self) for _ in range(self.number()))

    def rest(self) -> list[Raw]:
        """All values that are left."""
        return list(self._values)


def queued_record(cursor: Cursor) -> replies.QueuedRecord:
    """One entry of view's first list."""
    return replies.QueuedRecord(
        request_id=cursor.text(),
        epoch=cursor.number(),
        prompt_tokens=cursor.number(),
        max_tokens=cursor.number(),
        n=cursor.number(),
        prio=cursor.number(),
        submitted_ms=cursor.number(),
        deadline_ms=cursor.number(),
        tenant=cursor.text(),
        model=cursor.text(),
        attempts=cursor.number(),
    )


def instance_record(cursor: Cursor) -> replies.InstanceRecord:
    """One entry of view's second list."""
    return replies.InstanceRecord(
        instance_id=cursor.text(),
        role=cursor.text(),
        addr=cursor.text(),
        incarnation=cursor.number(),
        state=cursor.text(),
        beat_ms=cursor.number(),
        want_drain=cursor.number() == 1,
        p_requests=cursor.number(),
        p_tokens=cursor.number(),
        p_blocks=cursor.number(),
        d_requests=cursor.number(),
        d_blocks=cursor.number(),
        m_in=cursor.number(),
        m_out=cursor.number(),
        card=cursor.blob(),
        stats=cursor.blob(),
    )


def live_request(cursor: Cursor) -> replies.LiveRequest:
    """One entry of requests."""
    return replies.LiveRequest(
        request_id=cursor.text(),
        tenant=cursor.text(),
        state=cursor.text(),
        epoch=cursor.number(),
        prompt_tokens=cursor.number(),
        n=cursor.number(),
        p=cursor.text(),
        d=cursor.text(),
        submitted_ms=cursor.number(),
        attempts=cursor.number(),
        max_tokens=cursor.number(),
        deadline_ms=cursor.number(),
        next_epoch=cursor.number(),
        moves=cursor.number(),
        move_target=cursor.text(),
        d_blocks=cursor.number(),
    )


def move_record(cursor: Cursor) -> replies.MoveRecord:
    """One entry of moves."""
    return replies.MoveRecord(
        cursor.number(),
        cursor.text(),
        cursor.text(),
        cursor.number(),
        cursor.text(),
        cursor.text(),
        cursor.text(),
        cursor.text(),
    )


def look(cursor: Cursor) -> replies.Look:
    """One entry of look."""
    return replies.Look(cursor.text(), cursor.number(), cursor.number(), cursor.text(), cursor.blob())


def reaped(cursor: Cursor) -> replies.Reaped:
    """One entry of reap."""
    return replies.Reaped(cursor.text(), cursor.text())


def store_stats(cursor: Cursor) -> replies.StoreStats:
    """The pairs of stats."""
    values = cursor.rest()
    pairs = {as_text(key): as_text(value) for key, value in zip(values[::2], values[1::2], strict=True)}
    leader = pairs.pop("leader", "")
    totals = {key: int(value) for key, value in pairs.items()}
    return replies.StoreStats(
        queued=totals.get("queued", 0),
        live=totals.get("live", 0),
        leader=leader,
        leader_epoch=totals.get("leader_epoch", 0),
        generation=totals.get("generation", 0),
        totals=totals,
    )


def as_text(value: Raw) -> str:
    """A raw value as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of at most `size`, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
