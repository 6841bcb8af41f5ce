"""The record of one incoming transfer, and the table of those that are open or just committed."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

from protos.contract.errors import AutanError, BadFrame
from protos.wire import common, kv
from workers.engine_api.types import ImportTicket, PrefixTicket
from workers.kv_transfer.claims import Expectation
from workers.kv_transfer.frames import Reassembly
from workers.kv_transfer.hooks import Arrived
from workers.kv_transfer.ledger import Key, Side
from workers.kv_transfer.lifecycle import Lifecycle, ReceiveState, receiving


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    """One incoming transfer. `stream` numbers the attachments: a stream whose number is not this one has been replaced."""

    expected: Expectation
    ticket: ImportTicket
    reassembly: Reassembly
    window_bytes: int
    room_tokens: int  # KV rows that blocks were reserved for
    touched_s: float
    transfer_id: str = field(default_factory=lambda: secrets.token_hex(16))
    lifecycle: Lifecycle[ReceiveState] = field(default_factory=receiving)
    stream: int = 0
    credit: int = 0
    owed: int = 0
    waiting: asyncio.Timeout | None = None
    ended_by: AutanError | None = None
    committing: asyncio.Task[kv.Commit] | None = None
    in_engine: bool = False  # the engine was told to decode it
    loan: PrefixTicket | None = None  # of cached blocks, which enter the prefix cache and no sequence

    @property
    def request_id(self) -> str:
        """The request whose KV arrives."""
        return self.expected.request.request_id

    @property
    def epoch(self) -> int:
        """The epoch that it was assigned at."""
        return self.expected.request.epoch

    @property
    def key(self) -> Key:
        """The ledger's name of it."""
        return Key(self.request_id, self.epoch, Side.RECEIVE if self.loan is None else Side.BORROW)

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole sequence."""
        return len(self.ticket.block_ids)

    def arrival(self, end: kv.EndFrame, tokens: tuple[int, ...], commit_s: float) -> Arrived:
        """What is to decode here, its timeline complete: `commit_s` passed since the end frame came."""
        timeline = common.Timeline()
        timeline.CopyFrom(end.timeline)
        exposed_s = max(0.0, end.since_prefill_s) + commit_s
        if self.expected.is_move:
            timeline.migrations += 1
            timeline.migration_pause_s += exposed_s
        else:
            timeline.handoff_exposed_s = exposed_s
        return Arrived(
            request_id=self.request_id,
            epoch=self.epoch,
            next_token_ids=tokens,
            first_output_index=end.first_output_index,
            timeline=timeline,
            next_logprobs=tuple(end.next_logprobs),
        )

    def reset_credit(self) -> int:
        """A fresh window for a fresh stream."""
        self.credit, self.owed = self.window_bytes, 0
        return self.credit

    def spend(self, payload_bytes: int) -> None:
        """Takes received bytes off the window. Raises BadFrame beyond it."""
        self.credit -= payload_bytes
        self.owed += payload_bytes
        if self.credit < 0:
            raise BadFrame(f"{self.request_id}: {-self.credit} bytes beyond the credit")

    def regrant(self) -> int:
        """Bytes to grant again, in portions of a quarter window; zero when there is no portion yet."""
        if self.owed < self.window_bytes // 4:
            return 0
        granted, self.owed = self.owed, 0
        self.credit += granted
        return granted

    def wake(self) -> None:
        """Makes the attached stream look at the state instead of waiting for its next frame."""
        if self.waiting is not None:
            self.waiting.reschedule(asyncio.get_running_loop().time())


class TransferTable:
    """At most one transfer for each request."""

    def __init__(self) -> None:
        self._by_request: dict[str, Transfer] = {}
        self._by_id: dict[str, Transfer] = {}

    def add(self, transfer: Transfer) -> None:
        """Takes it on; another transfer of the request must be removed first."""
        assert transfer.request_id not in self._by_request, transfer.request_id
        self._by_request[transfer.request_id] = transfer
        self._by_id[transfer.transfer_id] = transfer

    def remove(self, transfer: Transfer) -> None:
        """Forgets it. Idempotent."""
        if self._by_id.pop(transfer.transfer_id, None) is not None:
            del self._by_request[transfer.request_id]

    def of_request(self, request_id: str) -> Transfer | None:
        """The transfer of a request, of whatever epoch."""
        return self._by_request.get(request_id)

    def of_id(self, transfer_id: str) -> Transfer | None:
        """The transfer that the receiver named so."""
        return self._by_id.get(transfer_id)

    def all(self) -> tuple[Transfer, ...]:
        """Every transfer, oldest first."""
        return tuple(self._by_id.values())
