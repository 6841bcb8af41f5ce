"""What the core was told and what it decided, kept for a while, and the history of one request or instance out of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from orchestrator.control import effects as do
from orchestrator.control import events as on
from orchestrator.control.core import OrchestratorCore
from orchestrator.control.effects import Effect
from orchestrator.control.events import Event
from orchestrator.domain.instance import InstanceState

_LINES_PER_ENTRY = 64


@dataclass(frozen=True, slots=True)
class Viewed:
    """What is kept of a view: enough for a story, not enough for a replay."""

    number: int
    queued_total: int
    ready: tuple[str, ...]  # ids of the READY instances


@dataclass(frozen=True, slots=True)
class Entry:
    """One event or effect. Effects follow the event that caused them and have its sequence number."""

    sequence: int
    at_s: float
    what: Event | Effect | Viewed


class Recorder:
    """A ring of the last `limit` entries. With `whole` set, views are kept whole: such a log can be replayed."""

    def __init__(self, limit: int = 8192, whole: bool = False) -> None:
        self._entries: deque[Entry] = deque(maxlen=limit)
        self._whole = whole
        self._sequence = 0

    def record(self, event: Event, effects: Iterable[Effect], now_s: float) -> None:
        """Adds an event and what came of it. Timers and hints that led to nothing are left out unless `whole`."""
        kept = [effect for effect in effects if self._whole or not isinstance(effect, do.WakeAt)]
        if not kept and not self._whole and isinstance(event, on.Ticked | on.Hinted):
            return
        self._sequence += 1
        self._entries.append(Entry(self._sequence, now_s, event if self._whole else _trimmed(event)))
        self._entries.extend(Entry(self._sequence, now_s, effect) for effect in kept)

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


def _trimmed(event: Event) -> Event | Viewed:
    if not isinstance(event, on.ViewRead):
        return event
    ready = tuple(item.instance_id for item in event.view.instances if item.state is InstanceState.READY)
    return Viewed(event.number, event.view.queued_total, ready)


def replay(core: OrchestratorCore, entries: Iterable[Entry]) -> list[Entry]:
    """Feeds the events of a whole log to a fresh core and returns the log that this makes: equal to the first one."""
    recorder = Recorder(limit=1 << 30, whole=True)
    for entry in entries:
        if isinstance(entry.what, Event):
            recorder.record(entry.what, core.handle(entry.what, entry.at_s), entry.at_s)
    return list(recorder)


def story(entries: Iterable[Entry], subject: str) -> list[str]:
    """The lines that concern one request or instance, oldest first: `[time] #sequence what`."""
    return [
        f"[{entry.at_s:.3f}] #{entry.sequence} {line}"
        for entry in entries
        for line in _lines(entry.what, subject)[:_LINES_PER_ENTRY]
    ]


def _lines(what: Event | Effect | Viewed, subject: str) -> list[str]:
    match what:
        case do.Explain(request_id, reason) if request_id == subject:
            return [f"{request_id} waits: {reason}"]
        case do.Assign():
            return [_assigned(what, item) for item in what.items if subject in (item.request_id, item.prefill, item.decode)]
        case do.Migrate():
            return [
                f"{item.request_id} moves from {item.source} to {item.target}: {item.why}, {item.note}"
                for item in what.items
                if subject in (item.request_id, item.source, item.target)
            ]
        case on.MigrateReplied():
            return [
                f"{outcome.request_id} move {what.number}: {outcome.code}, epoch {outcome.epoch}"
                for outcome in what.outcomes
                if outcome.request_id == subject
            ]
        case on.AssignReplied():
            return [
                f"{outcome.request_id} assignment {what.number}: {outcome.code}, epoch {outcome.epoch}"
                for outcome in what.outcomes
                if outcome.request_id == subject
            ]
        case on.Reaped():
            moved = [f"{ended.request_id} overdue: now {ended.state}" for ended in what.requests if ended.request_id == subject]
            return moved + [f"{instance} set LOST" for instance in what.lost if instance == subject]
        case on.LeadershipGained() | on.LeadershipLost():
            return [f"{type(what).__name__} (leader epoch {what.epoch})"]
        case on.StoreLost():
            return [f"store lost: {what.reason}"]
        case on.StoreBack():
            return ["store back"]
        case _:
            return []


def _assigned(batch: do.Assign, item: do.Assignment) -> str:
    where = f"{item.prefill}/{item.prefill_incarnation} prefills, {item.decode}/{item.decode_incarnation} decodes"
    if item.prefill == item.decode:
        where = f"{item.prefill}/{item.prefill_incarnation} does both"
    blocks = f"reserves {item.prefill_blocks}+{item.decode_blocks} blocks"
    return f"{item.request_id} assignment {batch.number}: {where}, {blocks}, from epoch {item.expected_epoch}"
