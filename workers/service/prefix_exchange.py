"""Cached blocks between this worker and others: what is told of them, what comes, what goes."""

from __future__ import annotations

from dataclasses import dataclass

from protos.contract.errors import StaleEpoch
from protos.wire import common
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.prefix_receiver import PrefixReceiver
from workers.service.assignments import Assignment
from workers.service.cache_feed import CacheFeed
from workers.service.prefill_speed import PrefillSpeed
from workers.service.prefix_fetch import PrefixFetches
from workers.service.prefix_lending import Lendings
from workers.service.store import InboxEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixExchange:
    """The parts of it, and what the rest of the worker asks of all of them together."""

    feed: CacheFeed
    fetches: PrefixFetches
    lendings: Lendings
    receiver: PrefixReceiver
    counters: TransferCounters  # of prefixes alone
    speed: PrefillSpeed

    async def settle(self, assignment: Assignment) -> None:
        """Returns when nothing more comes for the prompt of the assignment."""
        await self.fetches.settle(assignment, self.receiver)

    def lend(self, entry: InboxEntry) -> None:
        """Pushes blocks to another worker."""
        self.lendings.start(entry)

    def drop(self, assignment: Assignment) -> None:
        """The request is dropped here. Idempotent."""
        self.fetches.cancel(assignment)
        error = StaleEpoch(f"{assignment.request_id}: epoch {assignment.epoch} is over")
        self.receiver.abort_request(assignment.request_id, assignment.epoch, error)

    def drop_all(self) -> None:
        """This incarnation is fenced: nothing comes or goes under it any more."""
        self.receiver.abort_all(StaleEpoch("this instance is fenced"))
        self.lendings.cancel_all()

    def report(self, stats: common.InstanceStats) -> None:
        """Adds to what goes along with every renewal."""
        counters, fetches = self.counters, self.fetches
        stats.fetched_blocks = counters.kv_blocks_received
        stats.fetched_bytes = counters.kv_bytes_received
        stats.fetches = fetches.fetched
        stats.fetches_failed.update(fetches.failed)
        stats.lent_blocks = counters.kv_blocks_sent
        stats.lent_bytes = counters.kv_bytes_sent
        stats.stale_refused += counters.stale_refused
        stats.prefill_tokens_per_s = self.speed.tokens_per_s

    async def close(self) -> None:
        """Ends everything that is under way."""
        await self.lendings.close()
        await self.receiver.settle()
        await self.feed.close()
