"""Who owns the blocks: sequences, and pins taken for transfers. Every reference in the pool is explained here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from protos.contract.errors import OutOfBlocks
from workers.batching.block_pool import BlockPool
from workers.batching.cache_tiers import CacheTiers
from workers.batching.prefix_cache import PrefixCache
from workers.batching.sequence import Sequence
from workers.engine_api.types import BlockOwner, CacheEvent, PrefixTicket

Key = tuple[str, int]  # request id, epoch


@dataclass(frozen=True, slots=True)
class Grant:
    """A sequence is to have `total` blocks, the first of which are the cached `hits`."""

    sequence: Sequence
    hits: Listing[int]
    total: int


@dataclass(frozen=True, slots=True)
class Loan:
    """Blocks of an open prefix import: `hits` were cached and stay, `fresh` are to be filled under `names` behind `parent`."""

    hits: tuple[int, ...]
    fresh: tuple[int, ...]
    parent: bytes
    names: tuple[bytes, ...]


class BlockLedger:
    """Moves block references between the pool, sequences and pins, and files full blocks in the prefix cache."""

    def __init__(self, num_blocks: int, prefix_cache: bool, tiers: CacheTiers | None = None) -> None:
        self._caching = prefix_cache
        self._tiers = tiers
        self._cache = PrefixCache() if tiers is None else PrefixCache(tiers.holds)
        if tiers is not None:
            tiers.connect(self._cache.gone, self._cache.found)
        self.pool = BlockPool(num_blocks, self._evict)
        self._loans: dict[int, Loan] = {}
        self._next_loan = 1
        self._pins: dict[Key, dict[int, None]] = {}
        self._pinned: Counter[int] = Counter()

    def match(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """Cached blocks that hold the first rows of the sequence, `max_tokens` at most. Changes nothing in the pool."""
        if not self._caching:
            return []
        return self._cache.match(sequence.names_of(max_tokens // sequence.block_tokens))

    def match_prefill(self, sequence: Sequence) -> list[int]:
        """As `match`, but leaves at least one token to compute: its logits give the next token."""
        return self.match(sequence, len(sequence.tokens) - 1)

    def used(self, sequence: Sequence, num_blocks: int) -> None:
        """The sequence starts with so many cached blocks."""
        if self._tiers is not None:
            self._tiers.used(sequence.names_of(num_blocks))

    def copy_ahead(self) -> None:
        """Has what is evicted next copied to the tiers below, in the background."""
        if self._tiers is not None:
            self._tiers.copy_ahead(self.pool, self._cache.name_of)

    @property
    def known_names(self) -> int:
        """Names that the pool or a tier below has."""
        return self._cache.known_names

    def give(self, grants: Listing[Grant]) -> None:
        """Gives empty-handed sequences their cached blocks and as many new ones as make their totals.

        Raises OutOfBlocks, and gives nothing to anyone, when they are not there.
        """
        for grant in grants:
            assert not grant.sequence.blocks, f"{grant.sequence.request_id} has blocks already"
            self.pool.share(grant.hits)  # of all, before anything is evicted
        try:
            fresh = self.pool.allocate(sum(grant.total - len(grant.hits) for grant in grants))
        except OutOfBlocks:
            for grant in grants:
                self.pool.free_blocks(reversed(grant.hits))
            raise
        for grant in grants:
            count = grant.total - len(grant.hits)
            grant.sequence.blocks = [*grant.hits, *fresh[:count]]
            grant.sequence.num_filed = len(grant.hits)
            del fresh[:count]

    def grow(self, sequence: Sequence) -> None:
        """Gives one more block. Raises OutOfBlocks when there is none."""
        sequence.blocks += self.pool.allocate(1)

    def trim(self, sequence: Sequence) -> None:
        """Takes back the blocks behind the computed rows."""
        self.pool.free_blocks(reversed(sequence.give_up_blocks(-(-sequence.num_computed // sequence.block_tokens))))

    def take_back(self, sequence: Sequence) -> None:
        """Takes all blocks of the sequence; the last ones go first, so that they are evicted before what they build on."""
        self.pool.free_blocks(reversed(sequence.take_blocks()))

    def file_computed(self, sequence: Sequence) -> None:
        """Files the blocks that computed rows fill and that were not offered before; rows that are not exact have no name."""
        first, full = sequence.num_filed, sequence.num_computed // sequence.block_tokens
        if full <= first or not self._caching or not sequence.is_exact:
            return
        names = sequence.names_of(full)
        parent = names[first - 1] if first else sequence.root
        self._file(parent, names[first:], sequence.blocks[first:full], first)
        sequence.num_filed = full

    def _file(self, parent: bytes, names: Listing[bytes], block_ids: Listing[int], first_depth: int) -> int:
        """Files consecutive full blocks behind `parent` and tells how many are new."""
        new = self._cache.store(parent, names, block_ids)
        for block_id in new:
            self.pool.keep(block_id)
        if self._tiers is not None:
            self._tiers.filed(parent, names, first_depth)
        return len(new)

    def pin(self, sequence: Sequence) -> tuple[int, ...]:
        """A second reference on each block of the sequence that has none yet for this key."""
        self._pin(sequence.key, sequence.blocks)
        return sequence.table

    def _pin(self, key: Key, block_ids: Iterable[int]) -> None:
        pins = self._pins.setdefault(key, {})
        fresh = [block_id for block_id in block_ids if block_id not in pins]
        self.pool.share(fresh)
        self._pinned.update(fresh)
        pins.update(dict.fromkeys(fresh))

    def unpin(self, key: Key) -> None:
        """Gives back all references of `pin`."""
        pins = self._pins.pop(key, {})
        for block_id in pins:
            if self._pinned[block_id] == 1:
                del self._pinned[block_id]
            else:
                self._pinned[block_id] -= 1
        self.pool.free_blocks(reversed(pins))

    def is_pinned(self, block_id: int) -> bool:
        """Safe from any thread."""
        return block_id in self._pinned

    def match_names(self, names: Listing[bytes]) -> list[int]:
        """The cached blocks of the longest known run of `names` from its start."""
        return self._cache.match(names) if self._caching else []

    def num_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these cached blocks nobody refers to: keeping them takes room."""
        return sum(not self.pool.ref_count(block_id) for block_id in block_ids)

    def lend(self, names: Listing[bytes], ticket_id: int) -> PrefixTicket:
        """Pins the longest cached run under a new ticket."""
        blocks = self.match_names(names)
        self._pin(_loan_key(ticket_id), blocks)
        return PrefixTicket(ticket_id=ticket_id, first_block=0, block_ids=tuple(blocks))

    def end_lending(self, ticket_id: int) -> bool:
        """Gives the pins of `lend` back."""
        known = _loan_key(ticket_id) in self._pins
        self.unpin(_loan_key(ticket_id))
        return known

    def borrow(self, root: bytes, names: Listing[bytes]) -> PrefixTicket:
        """Reserves blocks behind the cached run and keeps that run. Raises OutOfBlocks, having changed nothing."""
        hits = self.match_names(names)
        wanted = tuple(names[len(hits) :]) if self._caching else ()
        self.pool.share(hits)
        try:
            fresh = self.pool.allocate(len(wanted))
        except OutOfBlocks:
            self.pool.free_blocks(reversed(hits))
            raise
        ticket_id = self.new_ticket()
        parent = names[len(hits) - 1] if hits else root
        self._loans[ticket_id] = Loan(tuple(hits), tuple(fresh), parent, wanted)
        return PrefixTicket(ticket_id=ticket_id, first_block=len(hits), block_ids=tuple(fresh))

    def loan(self, ticket_id: int) -> Loan | None:
        """An open prefix import."""
        return self._loans.get(ticket_id)

    def end_borrowing(self, ticket_id: int, num_blocks: int) -> int:
        """Ends an open import: its first `num_blocks` fresh blocks are filed, none keeps an owner. Returns how many are new."""
        loan = self._loans.pop(ticket_id)
        num_new = self._file(loan.parent, loan.names[:num_blocks], loan.fresh[:num_blocks], len(loan.hits))
        self.pool.free_blocks(reversed((*loan.hits, *loan.fresh)))
        return num_new

    def new_ticket(self) -> int:
        """A number that no other loan of this engine has."""
        self._next_loan += 1
        return self._next_loan - 1

    def names(self) -> set[bytes]:
        """All names that the pool or a tier below has."""
        return self._cache.names() | (self._tiers.names() if self._tiers is not None else set())

    def drain_events(self) -> tuple[CacheEvent, ...]:
        return self._cache.drain_events()

    def leaked(self, sequences: Iterable[Sequence]) -> int:
        """Blocks with more references than these sequences and the pins explain."""
        owned = [sequence.blocks for sequence in sequences]
        explained = sum(map(len, owned)) + sum(map(len, self._pins.values()))
        explained += sum(len(loan.hits) + len(loan.fresh) for loan in self._loans.values())
        if explained == self.pool.total_refs:
            return 0
        owners = self._owners(owned)
        return sum(refs > owners[block_id] for block_id, refs in self.pool.referenced().items())

    def owners(self, sequences: Iterable[Sequence]) -> tuple[BlockOwner, ...]:
        """Every sequence, with or without blocks, and every pin of a request. Tickets of prefixes belong to no request."""
        requests = [
            BlockOwner(
                kind="request",
                request_id=sequence.request_id,
                epoch=sequence.epoch,
                stage=sequence.state.name.lower(),
                blocks=len(sequence.blocks),
            )
            for sequence in sequences
        ]
        transfers = [
            BlockOwner(kind="transfer", request_id=request_id, epoch=epoch, stage="pinned", blocks=len(pins))
            for (request_id, epoch), pins in self._pins.items()
            if request_id
        ]
        return (*requests, *transfers)

    def reclaim(self, sequences: Iterable[Sequence]) -> int:
        """Takes back every reference that no sequence and no pin explains; returns how many blocks had one too many."""
        owners = self._owners(sequence.blocks for sequence in sequences)
        excess = {block_id: refs - owners[block_id] for block_id, refs in self.pool.referenced().items()}
        leaked = [block_id for block_id, count in excess.items() if count > 0]
        for block_id in leaked:
            self.pool.free_blocks([block_id] * excess[block_id])
        return len(leaked)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError when references and owners differ, or the cache and the pool disagree."""
        self.pool.check_integrity()
        self._cache.check_integrity()
        owners = self._owners(sequence.blocks for sequence in sequences)
        refs = self.pool.referenced()
        for block_id in refs.keys() | owners.keys():
            have, want = refs.get(block_id, 0), owners[block_id]
            assert have == want, f"block {block_id} has {have} references, {want} are explained"
        assert self.pool.kept() == self._cache.blocks(), "kept blocks and filed blocks differ"
        names = self.names()
        assert len(names) == self.known_names, f"{self.known_names} names were told of, {len(names)} are here"
        if self._tiers is not None:
            self._tiers.check_integrity(self._cache.names())
        pinned: Counter[int] = Counter()
        for pins in self._pins.values():
            pinned.update(pins.keys())
        assert pinned == self._pinned, "pin counts and pins differ"

    def _evict(self, block_id: int) -> None:
        if self._tiers is not None:
            self._tiers.evicting(self._cache.name_of(block_id), block_id)
        self._cache.drop(block_id)

    def _owners(self, tables: Iterable[list[int]]) -> Counter[int]:
        owners: Counter[int] = Counter()
        for table in tables:
            owners.update(table)
        for pins in self._pins.values():
            owners.update(pins.keys())
        for loan in self._loans.values():
            owners.update((*loan.hits, *loan.fresh))
        return owners


def _loan_key(ticket_id: int) -> Key:
    """No request has the empty name."""
    return "", ticket_id
