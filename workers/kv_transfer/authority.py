"""Whether a sender may open a hand-off at all: its capability is genuine, has not expired and was not used up.

One use is one hand-off: the same sender may open it again after a broken stream. It is used up when it was committed or
closed; who shows it after that is refused until it expires.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from protos.contract.capability import Grant, GrantKind, Keyring
from protos.contract.errors import Unauthenticated
from protos.wire import kv

MAX_SPENT = 65_536


class StoreClock:
    """The time of Redis as this process last heard it, carried on by its own monotonic clock; never ahead of Redis."""

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._heard: tuple[int, float] | None = None

    def heard(self, now_ms: int) -> None:
        """A reply of Redis carried this time."""
        self._heard = (now_ms, self._monotonic_s())

    @property
    def now_ms(self) -> int | None:
        """None before anything was heard."""
        if self._heard is None:
            return None
        now_ms, at_s = self._heard
        return now_ms + int((self._monotonic_s() - at_s) * 1000)


class Authority:
    """Checks capabilities of one worker. Without `keys` everything passes: that is for tests and bare workers alone."""

    def __init__(
        self,
        keys: Callable[[], Keyring] | None,
        clock: StoreClock,
        max_spent: int = MAX_SPENT,
        kind: GrantKind = GrantKind.HANDOFF,
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._kind = kind
        self._max_spent = max_spent
        self._opened: dict[tuple[str, int], int] = {}
        self._spent: set[tuple[str, int]] = set()
        self._expiries: list[tuple[int, tuple[str, int]]] = []

    @property
    def is_required(self) -> bool:
        """True when a hand-off needs a capability here."""
        return self._keys is not None

    def of_kind(self, kind: GrantKind) -> Authority:
        """Another one, which admits what is signed for `kind` with the same keys, and nothing else."""
        return Authority(self._keys, self._clock, self._max_spent, kind)

    def admit(self, claim: kv.OpenRequest, block_bytes: int, *, is_here: bool) -> None:
        """Raises Unauthenticated, saying why. `is_here`: the transfer is known here, so this is the same use again."""
        if self._keys is None:
            return
        grant = grant_of(claim, block_bytes, self._kind)
        self._keys().verify(grant, claim.capability.mac)
        if claim.num_blocks > grant.blocks:
            raise Unauthenticated(f"{claim.request_id}: {claim.num_blocks} blocks, the capability allows {grant.blocks}")
        # Before the first poll of the inbox nothing is expected here either, so no hand-off can begin.
        now_ms = self._clock.now_ms
        if now_ms is not None:
            self._forget(now_ms)
            if now_ms >= grant.expires_at_ms:
                raise Unauthenticated(f"{claim.request_id}: the capability expired {now_ms - grant.expires_at_ms} ms ago")
        use = (claim.request_id, claim.epoch)
        if use in self._spent and not is_here:
            raise Unauthenticated(f"{claim.request_id}: the capability of epoch {claim.epoch} was used already")
        self._opened[use] = grant.expires_at_ms
        if len(self._opened) > self._max_spent:
            del self._opened[next(iter(self._opened))]

    def spend(self, request_id: str, epoch: int) -> None:
        """The hand-off is over: nobody opens it again. Idempotent."""
        use = (request_id, epoch)
        expires_at_ms = self._opened.pop(use, None)
        if expires_at_ms is None or use in self._spent:
            return
        self._spent.add(use)
        heapq.heappush(self._expiries, (expires_at_ms, use))
        if len(self._expiries) > self._max_spent:
            self._spent.discard(heapq.heappop(self._expiries)[1])

    def _forget(self, now_ms: int) -> None:
        while self._expiries and self._expiries[0][0] <= now_ms:
            self._spent.discard(heapq.heappop(self._expiries)[1])


def grant_of(claim: kv.OpenRequest, block_bytes: int, kind: GrantKind = GrantKind.HANDOFF) -> Grant:
    """What must have been signed for this claim to be allowed; its blocks may be fewer when it is a move or a prefix."""
    blocks = claim.capability.most_blocks or claim.num_blocks
    return Grant(
        kind=kind,
        request_id=claim.request_id,
        epoch=claim.epoch,
        source_instance=claim.source_instance,
        source_incarnation=claim.source_incarnation,
        target_instance=claim.target_instance,
        target_incarnation=claim.target_incarnation,
        blocks=blocks,
        kv_bytes=blocks * block_bytes,
        expires_at_ms=claim.capability.expires_at_ms,
    )
