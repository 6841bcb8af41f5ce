"""Questions of operators that the ingress hands on to the workers: all of them side by side, each with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from orchestrator.store.client import Store
from orchestrator.store.replies import InstanceRecord
from protos.contract.errors import AutanError, InvalidRequest, PeerUnavailable
from protos.rpc import Dialer, error_of, worker_pb2_grpc
from protos.wire import admin, error_to_wire

T = TypeVar("T")

ALIVE = frozenset({"STARTING", "READY", "DRAINING"})
_AT_ONCE = 32
_CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Answers(Generic[T]):
    """What came, by instance in the order of the registry, and who did not answer."""

    found: tuple[tuple[InstanceRecord, T], ...]
    unanswered: tuple[admin.Unanswered, ...]


class WorkerCalls:
    """Reaches the workers that are registered and alive."""

    def __init__(self, store: Store, dialer: Dialer) -> None:
        self._store = store
        self._dialer = dialer

    async def instances(self, wanted: Sequence[str] = ()) -> tuple[InstanceRecord, ...]:
        """The instances of these names, or all that are alive.

        Raises InvalidRequest for a name that is not registered, StoreUnavailable.
        """
        records = (await self._store.view(0)).instances
        names = {record.instance_id for record in records}
        unknown = sorted(set(wanted) - names)
        if unknown:
            there = ", ".join(sorted(names)) or "none"
            raise InvalidRequest(f"instance {unknown[0]!r} is not registered; there are: {there}")
        return tuple(r for r in records if (r.instance_id in wanted if wanted else r.state in ALIVE))

    async def heard_of_within(self, age_s: float) -> list[str]:
        """The instances that are alive, and those that were heard of not longer ago, by name. Raises StoreUnavailable."""
        view = await self._store.view(0)
        return [r.instance_id for r in view.instances if r.state in ALIVE or view.now_ms - r.beat_ms < age_s * 1000]

    async def ask(
        self, records: Sequence[InstanceRecord], question: Callable[[Any, InstanceRecord], Awaitable[T]], timeout_s: float
    ) -> Answers[T]:
        """Puts `question(stub, instance)` to every instance. Never raises for one that does not answer."""
        turns = asyncio.Semaphore(_AT_ONCE)
        replies = await asyncio.gather(*(self._ask_one(record, question, timeout_s, turns) for record in records))
        found = tuple((r, reply) for r, reply in zip(records, replies, strict=True) if not isinstance(reply, AutanError))
        unanswered = tuple(
            admin.Unanswered(instance_id=r.instance_id, address=r.addr, error=error_to_wire(reply))
            for r, reply in zip(records, replies, strict=True)
            if isinstance(reply, AutanError)
        )
        return Answers(found, unanswered)

    async def _ask_one(
        self,
        record: InstanceRecord,
        question: Callable[[Any, InstanceRecord], Awaitable[T]],
        timeout_s: float,
        turns: asyncio.Semaphore,
    ) -> T | AutanError:
        try:
            async with turns, self._dialer.open(record.addr) as channel:
                await asyncio.wait_for(channel.channel_ready(), min(_CONNECT_S, timeout_s))
                stub: Any = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
                return await asyncio.wait_for(question(stub, record), timeout_s)
        except TimeoutError:
            return PeerUnavailable(f"{record.instance_id} at {record.addr} does not answer: is its process alive?")
        except grpc.RpcError as error:
            return error_of(error)
