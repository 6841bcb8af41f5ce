"""What the receiver of hand-offs asks of this worker (workers.kv_transfer.hooks): assignments in, Redis commits out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from protos.contract.errors import AutanError, StaleEpoch
from workers.kv_transfer.claims import Addressee, Expectation
from workers.kv_transfer.hooks import Arrived
from workers.service.assignments import Assignment, Assignments, Part, Stage
from workers.service.membership import Membership
from workers.service.outbox import Outbox
from workers.service.retrying import while_store_is_away
from workers.service.store import WorkerStore

_INBOX_PATIENCE_S = 2.0


class Arrivals:
    """Implements ReceiverHooks over the assignments of this worker."""

    def __init__(
        self,
        *,
        me: Membership,
        here: Callable[[], Addressee],
        assignments: Assignments,
        store: WorkerStore,
        outbox: Outbox,
        poll_inbox: Callable[[], None],
        on_failed: Callable[[Assignment, AutanError], None],
        on_arrived: Callable[[Assignment], None],
        lease_s: float,
        commit_patience_s: float,
    ) -> None:
        self._me = me
        self._here = here
        self._assignments = assignments
        self._store = store
        self._outbox = outbox
        self._poll_inbox = poll_inbox
        self._on_failed = on_failed
        self._on_arrived = on_arrived
        self._lease_s = lease_s
        self._commit_patience_s = commit_patience_s
        self._news = asyncio.Condition()
        self._waiting = 0

    def here(self) -> Addressee:
        """Who this process is now."""
        return self._here()

    async def now_expected(self) -> None:
        """An assignment was taken on, or an epoch ended: those who wait in `expect` look again."""
        if self._waiting:
            async with self._news:
                self._news.notify_all()

    async def expect(self, request_id: str, epoch: int) -> Expectation:
        """The assignment; the sender may be faster than this worker's inbox, so it is waited for a moment."""
        self._waiting += 1
        try:
            async with asyncio.timeout(_INBOX_PATIENCE_S), self._news:
                while (assignment := self._assignments.get(request_id, epoch)) is None:
                    if self._assignments.is_stale(request_id, epoch):
                        raise StaleEpoch(f"{request_id}: epoch {epoch} is over")
                    self._poll_inbox()
                    await self._news.wait()
        except TimeoutError:
            raise StaleEpoch(f"{request_id}: not expected at epoch {epoch}") from None
        finally:
            self._waiting -= 1
        if assignment.part is not Part.DECODE:
            raise StaleEpoch(f"{request_id}: this instance does not decode it at epoch {epoch}")
        return Expectation(
            request=assignment.request,
            source_instance=assignment.peer_instance,
            source_incarnation=assignment.peer_incarnation,
            is_move=assignment.is_move,
        )

    def is_expected(self, request_id: str, epoch: int) -> bool:
        """True while the KV may still come."""
        assignment = self._assignments.get(request_id, epoch)
        return assignment is not None and assignment.stage in (Stage.EXPECTING, Stage.IMPORTING)

    async def commit(self, request_id: str, epoch: int) -> None:
        """Makes this instance the holder in Redis."""
        me, lease_s = self._me, self._lease_s
        await while_store_is_away(
            lambda: self._store.handoff(request_id, epoch, me.instance_id, me.number, lease_s), self._commit_patience_s
        )

    def opened(self, request_id: str, epoch: int) -> None:
        """Blocks are reserved."""
        assignment = self._assignments.get(request_id, epoch)
        if assignment is not None:
            assignment.lifecycle.move(Stage.IMPORTING)
            assignment.early.clear()  # of an earlier import, which was refused
            assignment.progress_s = time.monotonic()

    def arrived(self, sequence: Arrived) -> None:
        """The token that came along is this worker's to deliver from now on: the prefill worker forgets it."""
        assignment = self._assignments.get(sequence.request_id, sequence.epoch)
        assert assignment is not None, sequence.request_id
        assignment.lifecycle.move(Stage.DECODING)
        assignment.progress_s = time.monotonic()
        timeline = sequence.timeline
        timeline.decode_instance = self._me.instance_id
        assignment.timeline = timeline
        assignment.is_exact = sequence.is_exact
        self._outbox.open(sequence.request_id, sequence.epoch, sequence.first_output_index, assignment.ingress_address)
        for offset, token_id in enumerate(sequence.next_token_ids):
            logprobs = sequence.next_logprobs[offset] if sequence.next_logprobs else b""
            self._outbox.put(sequence.request_id, sequence.first_output_index + offset, token_id, logprobs)
        self._outbox.describe(sequence.request_id, timeline)
        self._on_arrived(assignment)
        if assignment.is_move or self._outbox.end_of(sequence.request_id) > sequence.first_output_index + 1:
            self._outbox.flush()

    def ended(self, request_id: str, epoch: int, error: AutanError) -> None:
        """The sender may open again; a sequence that the engine would not take after the commit has failed."""
        assignment = self._assignments.get(request_id, epoch)
        if assignment is None:
            return
        if assignment.stage is Stage.IMPORTING:
            assignment.lifecycle.move(Stage.EXPECTING)
        elif assignment.stage is Stage.DECODING:
            self._on_failed(assignment, error)
