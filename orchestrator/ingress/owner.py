"""The registration of this ingress: the lease under which it owns requests.

One ingress id is one process at a time. A process that registers anew fences the one before; what that one owned is an
orphan and may be adopted at once.
"""

from __future__ import annotations

import asyncio
import logging

from orchestrator.store.client import Store
from protos.contract.errors import AutanError, StoreUnavailable, UnavailableError
from protos.contract.redis_names import Code

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1.0


class Ownership:
    """Keeps the registration alive. `epoch` grows when it had to register again, because Redis was wiped."""

    def __init__(self, store: Store, ingress_id: str, address: str, ttl_s: float) -> None:
        self.ingress_id = ingress_id
        self.address = address
        self.epoch = 0
        self.is_fenced = False
        self.store_reachable = False
        self._store = store
        self._ttl_s = ttl_s
        self._generation = 0

    async def register(self) -> None:
        """Takes the id over, under a new epoch. Raises StoreUnavailable."""
        reply = await self._store.ingress(self.ingress_id, self.address, self._ttl_ms, 0)
        self._generation = (await self._store.stats()).generation
        self.epoch = reply.epoch
        self.store_reachable = True

    async def run(self) -> None:
        """Renews three times per lease, more often while Redis is away."""
        while not self.is_fenced:
            await asyncio.sleep(self._ttl_s / (3 if self.store_reachable else 10))
            await self.renew()

    async def renew(self) -> None:
        """One renewal; notices a Redis that is away, that came back, that was wiped, and another process under this id."""
        try:
            reply = await self._store.ingress(self.ingress_id, self.address, self._ttl_ms, self.epoch)
            if reply.code is Code.STALE:
                await self._superseded()
            self.store_reachable = True
        except StoreUnavailable as error:
            if self.store_reachable:
                logger.warning("Redis is away: %s", error)
            self.store_reachable = False
        except AutanError:
            logger.exception("the registration of %s could not be renewed", self.ingress_id)

    def check(self) -> None:
        """Raises UnavailableError when no request may be accepted under this registration."""
        if self.is_fenced:
            raise UnavailableError(f"another process took over as {self.ingress_id}; connect to that one", _RETRY_AFTER_S)
        if not self.epoch:
            raise UnavailableError(f"{self.ingress_id} is not registered yet", _RETRY_AFTER_S)

    async def _superseded(self) -> None:
        generation = (await self._store.stats()).generation
        if generation == self._generation:
            self.is_fenced = True
            logger.error("another process registered as %s: this one serves nothing any more", self.ingress_id)
        else:
            logger.warning("Redis was wiped: registering again")
            await self.register()

    @property
    def _ttl_ms(self) -> int:
        return int(self._ttl_s * 1000)
