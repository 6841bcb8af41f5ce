"""The receiving side of prefixes: cached blocks that another instance pushes here for a prompt that is about to be computed.

The stages are those of a hand-off (receiver), but for three things. What is expected is a number of leading full blocks of the
request's tokens, which both sides name by themselves: names hold the tenant's salt, so a block of another tenant has no name
that is expected here. What is verified enters the prefix cache and no sequence, and nobody asks Redis. And a transfer that ends
early keeps the leading blocks that are verified: each of them is as good alone.

Nothing stops a source from sending wrong bytes under a right name and digesting them well: that is the trust which a hand-off
asks for as well (the peer is one of this cluster's workers). The digest protects the wire, the capability says who may push.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from protos.contract.block_hash import HASH_BYTES, root_hash, unpack_names
from protos.contract.errors import BadFrame, OutOfBlocks, StaleEpoch, StaleIncarnation
from protos.wire import kv
from workers.engine_api.types import ImportTicket, PrefixTicket
from workers.kv_transfer.authority import Authority
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.claims import Addressee, Expectation
from workers.kv_transfer.commitment import Commitments
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.hooks import ReceiveLimits, ReceiverHooks
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.receiver import Receiver
from workers.kv_transfer.reservation import Reservations
from workers.kv_transfer.returns import ReceiverTasks, Returns
from workers.kv_transfer.striping import leading_blocks
from workers.kv_transfer.transfer import Transfer, TransferTable

ExactCompression = Literal["none", "lossless"]  # what enters the cache has the bytes that its source has

_UNWRITTEN = -1  # stands for a block that is here already: nothing is written to it


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixExpectation(Expectation):
    """Cached blocks that an assignment says will come: at most the first `most_blocks` of the request's tokens."""

    most_blocks: int


class _Reservations(Reservations):
    async def open(self, claim: kv.OpenRequest, here: Addressee) -> kv.OpenReply:
        if claim.num_blocks:
            return await super().open(claim, here)
        expected = await self._hooks.expect(claim.request_id, claim.epoch)
        _check_source(claim, expected)
        error = StaleEpoch(f"{claim.request_id}: {claim.source_instance} does not have its blocks any more")
        self._hooks.ended(claim.request_id, claim.epoch, error)
        return kv.OpenReply()

    def _check(self, claim: kv.OpenRequest, expected: Expectation, here: Addressee) -> None:
        _check_source(claim, expected)
        assert isinstance(expected, PrefixExpectation)
        if claim.offer.inexact:
            raise BadFrame(f"{claim.request_id}: the rows of a prefix are exact, or they are not cached")
        if claim.num_blocks > expected.most_blocks or claim.num_tokens != claim.num_blocks * here.layout.block_tokens:
            raise BadFrame(
                f"{claim.request_id}: {claim.num_tokens} tokens in {claim.num_blocks} blocks, expected are at most "
                f"{expected.most_blocks} blocks of {here.layout.block_tokens}"
            )
        if claim.block_hashes != _names(here, expected)[: claim.num_blocks * HASH_BYTES]:
            raise BadFrame(f"{claim.request_id}: the block hashes are not those of the request's tokens")

    async def _room(self, expected: Expectation, room_tokens: int) -> tuple[ImportTicket, PrefixTicket | None]:
        here, request = self._hooks.here(), expected.request
        count = room_tokens // here.layout.block_tokens
        names = unpack_names(_names(here, expected))[:count]
        if len(names) < count:
            raise BadFrame(f"{request.request_id}: {count} blocks, its tokens fill {len(names)}")
        root = root_hash(here.fingerprint.weights_digest, request.cache_salt)
        try:
            loan = await self._port.call(lambda engine: engine.import_prefix_begin(root, names))
        except OutOfBlocks as error:
            self._hooks.ended(request.request_id, request.epoch, error)
            raise
        if loan.first_block + len(loan.block_ids) < count:
            await self._port.call(lambda engine: engine.import_prefix_abort(loan.ticket_id))
            missing = OutOfBlocks(f"{request.request_id}: {here.instance_id} keeps no prefix cache")
            self._hooks.ended(request.request_id, request.epoch, missing)
            raise missing
        ticket = ImportTicket(
            request_id=request.request_id,
            epoch=request.epoch,
            block_ids=(_UNWRITTEN,) * loan.first_block + loan.block_ids,
            reused_blocks=loan.first_block,
        )
        return ticket, loan


class _Commitments(Commitments):
    def _check(self, transfer: Transfer, end: kv.EndFrame, here: Addressee) -> tuple[int, ...]:
        if end.num_tokens != transfer.room_tokens or end.next_token_ids or end.next_logprobs:
            raise BadFrame(f"end: {end.num_tokens} tokens, opened with {transfer.room_tokens}; a prefix has no next token")
        return ()

    def _enter_engine(self, transfer: Transfer, end: kv.EndFrame, tokens: tuple[int, ...]) -> asyncio.Future[Any]:
        loan = _loan(transfer)
        return self._port.call(lambda engine: engine.import_prefix_commit(loan.ticket_id, len(loan.block_ids)))


class _Returns(Returns):
    def __init__(
        self, port: EnginePort, hooks: ReceiverHooks, ledger: Ledger, table: TransferTable, tasks: ReceiverTasks
    ) -> None:
        super().__init__(port, hooks, ledger, table, tasks)
        self.kept: dict[tuple[str, int], int] = {}  # blocks of transfers that ended early, until PrefixReceiver.end

    def _drop(self, transfer: Transfer) -> asyncio.Future[Any]:
        loan, count, is_over = _loan(transfer), _came(transfer), transfer.in_engine
        self.kept[transfer.request_id, transfer.epoch] = count
        return self._port.call(lambda engine: None if is_over else engine.import_prefix_commit(loan.ticket_id, count))


class PrefixReceiver(Receiver):
    """All prefixes on their way here. `hooks.arrived` tells that one is in the cache, `hooks.ended` that no more comes."""

    reservations = _Reservations
    commitments = _Commitments
    returns = _Returns

    def __init__(
        self,
        *,
        port: EnginePort,
        hooks: ReceiverHooks,
        ledger: Ledger,
        counters: TransferCounters,
        limits: ReceiveLimits,
        reach: Callable[[str], Awaitable[None]],
        authority: Authority,
        compression: ExactCompression = "none",
    ) -> None:
        super().__init__(
            port=port,
            hooks=hooks,
            ledger=ledger,
            counters=counters,
            limits=limits,
            reach=reach,
            authority=authority,
            compression=compression,
        )
        assert isinstance(self._returns, _Returns)
        self._kept = self._returns.kept

    def came(self, request_id: str, epoch: int) -> int:
        """Blocks that were brought and verified for a request so far."""
        transfer = self._table.of_request(request_id)
        if transfer is None or transfer.epoch != epoch:
            return self._kept.get((request_id, epoch), 0)
        return _came(transfer)

    async def end(self, request_id: str, epoch: int, error: StaleEpoch) -> None:
        """Nothing more may come for the request at this epoch; what is verified stays. Returns when the engine knows."""
        self.abort_request(request_id, epoch, error)
        await self._returns.over(request_id)
        self._kept.pop((request_id, epoch), None)
        self._authority.spend(request_id, epoch)


def _came(transfer: Transfer) -> int:
    return min(leading_blocks(transfer.next_blocks), transfer.num_blocks) - _loan(transfer).first_block


def _loan(transfer: Transfer) -> PrefixTicket:
    assert transfer.loan is not None, transfer.request_id
    return transfer.loan


def _names(here: Addressee, expected: Expectation) -> bytes:
    return sequence_hashes(here.fingerprint, expected.request)


def _check_source(claim: kv.OpenRequest, expected: Expectation) -> None:
    """Raises StaleIncarnation when somebody else pushes than the orchestrator said."""
    source = (claim.source_instance, claim.source_incarnation)
    if source != (expected.source_instance, expected.source_incarnation):
        raise StaleIncarnation(
            f"{claim.request_id}: comes from {source[0]} incarnation {source[1]}, its source is "
            f"{expected.source_instance} incarnation {expected.source_incarnation}"
        )
