"""The record of one incoming transfer, and the table of those that are open or just committed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from protos.contract.errors import AutanError
from protos.wire import common, kv
from workers.engine_api.types import ImportTicket, PrefixTicket
from workers.kv_transfer.bell import Bell
from workers.kv_transfer.claims import Expectation
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.encodings import Encoding
from workers.kv_transfer.frames import Reassembly
from workers.kv_transfer.hooks import Arrived
from workers.kv_transfer.ledger import Key, Side
from workers.kv_transfer.lifecycle import Lifecycle, ReceiveState, receiving
from workers.kv_transfer.packing import GroupUnpacker
from workers.kv_transfer.pool_mappings import PoolMapping
from workers.kv_transfer.stripe import Stripe


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    """One incoming transfer. `make_reassembly(stream, streams, first_block)` gives the cursor of a stream."""

    expected: Expectation
    ticket: ImportTicket
    make_reassembly: Callable[[int, int, int], Reassembly]
    scope: DigestScope
    make_unpacker: Callable[[], GroupUnpacker]
    encoding: Encoding
    is_exact_source: bool  # the sender has the rows that it would have computed itself
    window_bytes: int
    room_tokens: int  # KV rows that blocks were reserved for
    touched_s: float
    booked_s: float = 0.0  # when the ledger heard of it last
    transfer_id: str = field(default_factory=lambda: secrets.token_hex(16))
    lifecycle: Lifecycle[ReceiveState] = field(default_factory=receiving)
    stripes: tuple[Stripe, ...] = ()
    news: Bell = field(default_factory=Bell)
    is_ending: bool = False  # the end is here, blocks of other streams may still come
    ended_by: AutanError | None = None
    committing: asyncio.Task[kv.Commit] | None = None
    pool: PoolMapping | None = None  # the sender's, when frames may name bytes of it
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
    def is_exact(self) -> bool:
        """True when the rows here are those that this instance would have computed."""
        return self.is_exact_source and self.encoding.is_exact

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
            is_exact=self.is_exact,
        )

    def stripe_over(self, first_block: int, streams: int) -> None:
        """Blocks from `first_block` on come on so many streams, each under its part of the window."""
        for stripe in self.stripes:
            stripe.begin_again()
        self.stripes = tuple(
            Stripe(
                number=number,
                reassembly=self.make_reassembly(number, streams, first_block),
                unpacker=self.make_unpacker(),
                window_bytes=max(2, self.window_bytes // streams),
            )
            for number in range(streams)
        )

    def begin_again(self) -> int:
        """The sender opens again: every stream goes on behind its verified blocks. Gives the credit of each."""
        return min(stripe.begin_again() for stripe in self.stripes)

    @property
    def next_blocks(self) -> tuple[int, ...]:
        """The block that each stream goes on with."""
        return tuple(stripe.reassembly.next_block for stripe in self.stripes)

    @property
    def is_attached(self) -> bool:
        """True while any stream is."""
        return any(stripe.is_attached for stripe in self.stripes)

    def wake(self) -> None:
        """Makes all who wait for this transfer look at its state."""
        for stripe in self.stripes:
            stripe.wake()
        self.news.ring()


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
