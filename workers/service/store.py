"""The worker's side of the Redis library: register, pick, renew, handoff, fail, and who holds a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from protos.cancellation import cancellable
from protos.contract.errors import AutanError, InternalError, StaleEpoch, StaleIncarnation, StoreFull, StoreUnavailable
from protos.contract.redis_names import Code, Fn, InboxKind, base_key, instance_channel
from protos.wire import error_to_wire
from protos.wire import store as records
from workers.kv_transfer.authority import StoreClock
from workers.kv_transfer.handoff_job import Holder

_AWAY = ("MISCONF", "BUSY", "LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS")
_ENTRY = 19  # fields of one entry of pick
_NO_FUNCTION = "function not found"


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxEntry:
    """One message of an inbox. `peer` is the other instance of the hand-off; revoke and owner have neither spec nor peer."""

    seq: int
    kind: InboxKind
    request_id: str
    epoch: int
    spec: bytes = b""
    journal: bytes = b""
    peer_instance: str = ""
    peer_address: str = ""
    peer_incarnation: int = 0
    ingress_id: str = ""
    ingress_address: str = ""
    queued_s: float = 0.0
    attempts: int = 0
    capability: bytes = b""  # to show the peer when the transfer opens
    source_instance: str = ""  # pushes the first source_blocks blocks to whoever prefills; empty: nobody
    source_incarnation: int = 0
    source_blocks: int = 0
    source_wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """What a beat brought: whether to drain, and which of the reported requests are not this instance's."""

    want_drain: bool
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One request as it is reported with a beat; `holding` renews its lease."""

    request_id: str
    epoch: int
    holding: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRecord:
    """An instance as Redis knows it."""

    incarnation: int
    state: str
    address: str


class WorkerStore:
    """One connection pool to Redis. Every method raises StoreUnavailable when Redis cannot be asked in time."""

    def __init__(self, url: str, cluster: str, timeout_s: float) -> None:
        self._base = base_key(cluster)
        self._cluster = cluster
        self.clock = StoreClock()
        self._redis = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            decode_responses=False,
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()

    async def register(self, instance_id: str, role: str, address: str, card: bytes) -> int:
        """Announces this process and returns its incarnation; every older one is fenced from now on."""
        reply = await self._call(Fn.REGISTER, instance_id, role, address, card)
        return int(reply[1])

    async def deregister(self, instance_id: str, incarnation: int) -> None:
        """Says goodbye: what this incarnation takes part in is requeued."""
        await self._call(Fn.DEREGISTER, instance_id, incarnation)

    async def pick(
        self, instance_id: str, incarnation: int, ack_seq: int, max_n: int, lease_s: float
    ) -> tuple[InboxEntry, ...]:
        """The next messages after `ack_seq`, which is forgotten. Raises StaleIncarnation."""
        reply = await self._call(Fn.PICK, instance_id, incarnation, ack_seq, max_n, int(lease_s * 1000))
        _current(reply, instance_id, incarnation)
        now_ms, count, fields = int(reply[1]), int(reply[2]), reply[3:]
        self.clock.heard(now_ms)
        return tuple(_entry(fields[_ENTRY * at : _ENTRY * (at + 1)], now_ms) for at in range(count))

    async def renew(
        self, instance_id: str, incarnation: int, *, state: str, stats: bytes, lease_s: float, held: Sequence[Held]
    ) -> Renewal:
        """Beats, reports and keeps the leases of what is held. Raises StaleIncarnation."""
        items = [part for one in held for part in (one.request_id, one.epoch, "h" if one.holding else "e")]
        lease_ms = int(lease_s * 1000)
        reply = await self._call(Fn.RENEW, instance_id, incarnation, state, stats, lease_ms, len(held), *items)
        _current(reply, instance_id, incarnation)
        if _code(reply) is not Code.OK:
            raise InternalError(f"{instance_id}: the store refused state {state}: {reply!r}")
        return Renewal(want_drain=_text(reply[2]) == "1", lost=tuple(_text(name) for name in reply[4:]))

    async def handoff(self, request_id: str, epoch: int, instance_id: str, incarnation: int, lease_s: float) -> None:
        """Makes the instance the holder that decodes; again is fine. Raises StaleEpoch when it may not be."""
        reply = await self._call(Fn.HANDOFF, request_id, epoch, instance_id, incarnation, int(lease_s * 1000))
        if _code(reply) not in (Code.OK, Code.DUPLICATE):
            raise StaleEpoch(f"{request_id}: epoch {epoch} may not be handed to {instance_id}: {_code(reply)}")

    async def stay(self, request_id: str, move_epoch: int, instance_id: str, incarnation: int) -> bool:
        """Ends a move without a commit. True: the instance holds the request and decodes on; False: it does not hold it."""
        reply = await self._call(Fn.STAY, request_id, move_epoch, instance_id, incarnation)
        return _code(reply) in (Code.OK, Code.DUPLICATE)

    async def fail(
        self,
        request_id: str,
        epoch: int,
        instance_id: str,
        incarnation: int,
        *,
        error: AutanError,
        retryable: bool,
        poison: bool,
        max_attempts: int,
        retain_s: float,
    ) -> str:
        """Gives a request up and returns its state. Raises StaleEpoch when it is somebody else's already."""
        stored = records.StoredError(error=error_to_wire(error), instance_id=instance_id).SerializeToString()
        flags = (int(retryable), int(poison), max_attempts, int(retain_s * 1000))
        reply = await self._call(Fn.FAIL, request_id, epoch, instance_id, incarnation, *flags, stored)
        if _code(reply) is not Code.OK:
            raise StaleEpoch(f"{request_id}: epoch {epoch} is over: {_code(reply)}")
        return _text(reply[1])

    async def holder_of(self, request_id: str) -> Holder | None:
        """Who holds a request now; none when it is not known."""
        key = f"{self._base}:r:{request_id}"
        state, epoch, holder, incarnation = await self._read(key, "state", "epoch", "holder", "holder_inc")
        if state is None or epoch is None:
            return None
        return Holder(int(epoch), _text(state), _text(holder or b""), int(incarnation or 0))

    async def instance(self, instance_id: str) -> InstanceRecord | None:
        """What is registered under a name; none when nothing ever was."""
        incarnation, state, address = await self._read(f"{self._base}:i:{instance_id}", "incarnation", "state", "addr")
        if incarnation is None:
            return None
        return InstanceRecord(incarnation=int(incarnation), state=_text(state or b""), address=_text(address or b""))

    async def time_s(self) -> float:
        """Redis TIME in seconds."""
        try:
            seconds, micros = await cancellable(self._redis.time())
        except (RedisError, OSError, TimeoutError) as error:
            raise store_error(error) from error
        return int(seconds) + int(micros) / 1e6

    async def hints(self, instance_id: str) -> PubSub:
        """A subscription to the hints of an inbox; lossy. The caller closes it."""
        channel = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            await cancellable(channel.subscribe(instance_channel(self._cluster, instance_id)))
        except (RedisError, OSError, TimeoutError) as error:
            await channel.aclose()  # type: ignore[no-untyped-call]
            raise store_error(error) from error
        return channel

    async def _call(self, function: Fn, *args: str | int | bytes) -> list[Any]:
        try:
            reply: Any = await cancellable(self._redis.fcall(function.value, 1, self._base, *args))
        except (RedisError, OSError, TimeoutError) as error:
            raise store_error(error) from error
        return list(reply)

    async def _read(self, key: str, *fields: str) -> list[bytes | None]:
        try:
            values: Any = await cancellable(self._redis.hmget(key, list(fields)))
        except (RedisError, OSError, TimeoutError) as error:
            raise store_error(error) from error
        return list(values)


def store_error(error: Exception) -> AutanError:
    """What a failed call to Redis means."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or text.startswith("OOM"):
        return StoreFull(f"Redis is at its memory limit: {text}", 1.0)
    away = isinstance(error, (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OSError, TimeoutError))
    if away or text.startswith(_AWAY) or _NO_FUNCTION in text.lower():
        return StoreUnavailable(f"Redis: {type(error).__name__}: {text}", 0.5)
    return InternalError(f"Redis refused a call: {text}")


def _code(reply: Sequence[Any]) -> Code:
    return Code(_text(reply[0]))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _current(reply: Sequence[Any], instance_id: str, incarnation: int) -> None:
    code = _code(reply)
    if code in (Code.STALE, Code.GONE):
        raise StaleIncarnation(f"{instance_id}: incarnation {incarnation} is over: {code}")


def _entry(fields: Sequence[Any], now_ms: int) -> InboxEntry:
    submitted_ms = int(fields[12] or 0)
    return InboxEntry(
        seq=int(fields[0]),
        kind=InboxKind(_text(fields[1])),
        request_id=_text(fields[2]),
        epoch=int(fields[3]),
        spec=bytes(fields[4]),
        journal=bytes(fields[5]),
        peer_instance=_text(fields[6]),
        peer_address=_text(fields[7]),
        peer_incarnation=int(fields[8] or 0),
        ingress_id=_text(fields[9]),
        ingress_address=_text(fields[10]),
        queued_s=max(0, now_ms - submitted_ms) / 1000 if submitted_ms else 0.0,
        attempts=int(fields[13] or 0),
        capability=bytes(fields[14]),
        source_instance=_text(fields[15]),
        source_incarnation=int(fields[16] or 0),
        source_blocks=int(fields[17] or 0),
        source_wait_s=int(fields[18] or 0) / 1000,
    )
