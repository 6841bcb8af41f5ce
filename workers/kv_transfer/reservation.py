"""How an incoming transfer begins: room is reserved for it, or the one that is there already goes on."""

from __future__ import annotations

import asyncio
import time
from weakref import WeakValueDictionary

from protos.contract.errors import BadFrame, StaleEpoch
from protos.wire import fingerprint_key, kv
from workers.engine_api.types import ImportTicket, PrefixTicket
from workers.kv_transfer.claims import Addressee, Expectation, check_expected
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.encodings import Compression, Encoding, chosen
from workers.kv_transfer.frames import Reassembly
from workers.kv_transfer.hooks import ReceiveLimits, ReceiverHooks
from workers.kv_transfer.ledger import Entry, Ledger
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.packing import GroupUnpacker
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.returns import Returns
from workers.kv_transfer.striping import first_at, granted_streams, leading_blocks
from workers.kv_transfer.transfer import Transfer, TransferTable


class Reservations:
    """Opens transfers: at most one for each request, of its newest epoch."""

    def __init__(
        self,
        *,
        port: EnginePort,
        hooks: ReceiverHooks,
        ledger: Ledger,
        limits: ReceiveLimits,
        table: TransferTable,
        returns: Returns,
        compression: Compression,
    ) -> None:
        self._port = port
        self._hooks = hooks
        self._ledger = ledger
        self._limits = limits
        self._table = table
        self._returns = returns
        self._compression = compression
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def open(self, claim: kv.OpenRequest, here: Addressee) -> kv.OpenReply:
        """Raises StaleEpoch, StaleIncarnation, BadFrame or OutOfBlocks. Not to be cancelled: see Receiver.open."""
        expected = await self._hooks.expect(claim.request_id, claim.epoch)
        self._check(claim, expected, here)
        lock = self._locks.setdefault(claim.request_id, asyncio.Lock())
        async with lock:
            current = self._table.of_request(claim.request_id)
            if current is not None and current.expected == expected:
                if claim.num_tokens != current.room_tokens:
                    raise BadFrame(f"{claim.request_id}: opened with {current.room_tokens} tokens, now {claim.num_tokens}")
                encoding = current.encoding
                is_offered = encoding is Encoding.NONE or encoding.value in claim.offer.encodings
                if not is_offered or claim.offer.inexact is current.is_exact_source:
                    raise BadFrame(f"{claim.request_id}: opened again with another offer of encodings")
                return await self._open_again(current, claim.streams)
            if current is not None and current.epoch >= claim.epoch:
                raise StaleEpoch(f"{claim.request_id}: epoch {current.epoch} is here already")
            if current is not None:
                await self._returns.abort(current, StaleEpoch(f"{claim.request_id}: epoch {claim.epoch} has begun"))
            return await self._reserve(expected, here, claim)

    def _check(self, claim: kv.OpenRequest, expected: Expectation, here: Addressee) -> None:
        check_expected(claim, expected, here)

    async def _room(self, expected: Expectation, room_tokens: int) -> tuple[ImportTicket, PrefixTicket | None]:
        """Reserves blocks in the engine."""
        request, known = expected.request, expected.num_tokens
        return await self._port.call(lambda engine: engine.import_begin(request, known, room_tokens - known)), None

    async def _open_again(self, transfer: Transfer, asked: int) -> kv.OpenReply:
        if transfer.committing is not None:
            await asyncio.shield(transfer.committing)
        transfer.touched_s = time.monotonic()
        transfer.wake()
        if transfer.lifecycle.state is ReceiveState.RECEIVING:
            transfer.lifecycle.move(ReceiveState.OPEN)
        streams = self._granted(transfer, asked)
        if streams != len(transfer.stripes) and transfer.lifecycle.state is ReceiveState.OPEN:
            # Blocks behind the leading run come again: which streams bring them has changed.
            transfer.stripe_over(leading_blocks(transfer.next_blocks), streams)
        return self._reply(transfer)

    def _encoding_of(self, claim: kv.OpenRequest, here: Addressee) -> Encoding:
        return chosen(self._compression, claim.offer.encodings, here.layout)

    def _granted(self, transfer: Transfer, asked: int) -> int:
        return granted_streams(asked, self._limits.streams, transfer.num_blocks - transfer.ticket.reused_blocks)

    @staticmethod
    def _reply(transfer: Transfer) -> kv.OpenReply:
        credit, next_blocks = transfer.begin_again(), transfer.next_blocks
        return kv.OpenReply(
            transfer_id=transfer.transfer_id,
            credit_bytes=credit,
            first_block=leading_blocks(next_blocks),
            next_blocks=next_blocks if len(next_blocks) > 1 else (),
            encoding=transfer.encoding.value,
        )

    async def _reserve(self, expected: Expectation, here: Addressee, claim: kv.OpenRequest) -> kv.OpenReply:
        request, room_tokens = expected.request, claim.num_tokens
        await self._returns.over(request.request_id)
        ticket, loan = await self._room(expected, room_tokens)
        scope = DigestScope(fingerprint_key(here.fingerprint), request.request_id, request.epoch)
        encoding = self._encoding_of(claim, here)
        transfer = Transfer(
            expected=expected,
            ticket=ticket,
            make_reassembly=lambda stream, streams, first: Reassembly(
                here.layout, scope, first_at(stream, streams, first), len(ticket.block_ids), streams
            ),
            scope=scope,
            make_unpacker=lambda: GroupUnpacker(encoding, here.layout, scope),
            encoding=encoding,
            is_exact_source=not claim.offer.inexact,
            window_bytes=self._limits.window_bytes,
            room_tokens=room_tokens,
            touched_s=time.monotonic(),
            loan=loan,
        )
        transfer.stripe_over(ticket.reused_blocks, self._granted(transfer, claim.streams))
        self._ledger.open(
            Entry(
                key=transfer.key,
                owner=here.instance_id,
                writer=f"{expected.source_instance}/{expected.source_incarnation}",
                blocks=transfer.num_blocks,
                deadline_s=self._limits.deadline_s(transfer.touched_s),
                state=lambda: transfer.lifecycle.state.value,
            )
        )
        self._table.add(transfer)
        if not self._hooks.is_expected(request.request_id, request.epoch):
            error = StaleEpoch(f"{request.request_id}: epoch {request.epoch} was revoked meanwhile")
            await self._returns.abort(transfer, error)
            raise error
        self._hooks.opened(request.request_id, request.epoch)
        return self._reply(transfer)
