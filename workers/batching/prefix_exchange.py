"""Cached blocks that leave an engine, or enter it, by content; see workers.engine_api.protocol.Engine for the guarantees."""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Listing

from protos.contract.errors import BadFrame, StaleEpoch
from workers.batching.admission import check_room
from workers.batching.cache_tiers import CacheTiers
from workers.batching.import_gate import ImportGate
from workers.batching.ledger import BlockLedger
from workers.batching.recalling import Lent
from workers.batching.scheduler import Plan
from workers.batching.sequence import Sequence
from workers.batching.tier_returns import TierReturns
from workers.engine_api.types import DiskAudit, PrefixTicket


class PrefixExchange:
    """The part of an engine that is about blocks by content, here and in lower tiers; what it works on is the engine's."""

    _lock: threading.Lock
    _ledger: BlockLedger
    _tiers: CacheTiers | None
    _gate: ImportGate
    _returns: TierReturns
    _waiting: list[Sequence]
    _plan: Plan | None

    def _settle(self) -> None:
        raise NotImplementedError

    def known_names(self) -> set[bytes]:
        with self._lock:
            self._settle()
            return self._ledger.names()

    def match_prefix(self, names: Listing[bytes]) -> int:
        with self._lock:
            return len(self._ledger.match_names(names))

    def export_prefix(self, names: Listing[bytes]) -> PrefixTicket:
        with self._lock:
            self._plan = None
            return self._ledger.lend(names, self._ledger.new_ticket())

    def recall_prefix(self, names: Listing[bytes], wait_s: float, lent: Lent) -> int:
        with self._lock:
            self._settle()
            self._plan = None
            return self._returns.recall(names, wait_s, lent)

    def export_prefix_end(self, ticket_id: int) -> bool:
        with self._lock:
            self._plan = None
            return self._returns.forget_recall(ticket_id) or self._ledger.end_lending(ticket_id)

    def audit_disk(self, max_blocks: int, seed: int, told: Callable[[DiskAudit], None]) -> None:
        with self._lock:
            self._settle()
            if self._tiers is None:
                told(DiskAudit())
            else:
                self._tiers.audit_disk(max_blocks, seed, told)

    def import_prefix_begin(self, root: bytes, names: Listing[bytes]) -> PrefixTicket:
        with self._lock:
            self._plan = None
            check_room(len(names) - len(self._ledger.match_names(names)), self._waiting, self._ledger.pool)
            ticket = self._ledger.borrow(root, names)
            self._gate.open(ticket.block_ids)
            return ticket

    def import_prefix_commit(self, ticket_id: int, num_blocks: int) -> int:
        with self._lock:
            loan = self._ledger.loan(ticket_id)
            if loan is None:
                raise StaleEpoch(f"prefix import {ticket_id} is not open")
            if not 0 <= num_blocks <= len(loan.fresh):
                raise BadFrame(f"prefix import {ticket_id}: {num_blocks} of {len(loan.fresh)} blocks")
            return self._end_prefix_import(ticket_id, num_blocks)

    def import_prefix_abort(self, ticket_id: int) -> bool:
        with self._lock:
            known = self._ledger.loan(ticket_id) is not None
            if known:
                self._end_prefix_import(ticket_id, 0)
            return known

    def _end_prefix_import(self, ticket_id: int, num_blocks: int) -> int:
        loan = self._ledger.loan(ticket_id)
        assert loan is not None
        self._plan = None
        self._gate.close(loan.fresh)
        return self._ledger.end_borrowing(ticket_id, num_blocks)
