"""Both sides of the KV plane without an engine: a pool in memory, and a process that expects one request."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos.contract.errors import AutanError
from protos.wire import common
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.types import EngineRequest, ImportTicket, KvLayout, KvPlace, SamplingParams
from workers.kv_transfer.claims import Addressee, Expectation
from workers.kv_transfer.hooks import Arrived

BLOCK_TOKENS = 64
FINGERPRINT = common.Fingerprint(model="m", block_tokens=BLOCK_TOKENS)


def request_of(blocks: int, request_id: str = "r") -> EngineRequest:
    """A request whose prompt fills so many blocks."""
    return EngineRequest(
        request_id=request_id, epoch=1, prompt=(1,) * (blocks * BLOCK_TOKENS), sampling=SamplingParams(max_tokens=1)
    )


class MemoryPool:
    """EnginePort over memory, plain or `shared`; blocks have the ids of their places in the sequence, `reused` of them are
    there."""

    def __init__(self, layout: KvLayout, blocks: int, pattern: bytes, reused: int = 0, *, shared: bool = False) -> None:
        self.layout = layout
        self.imports_dropped = 0
        self._reused = reused
        self.memory = PoolMemory(shared=shared)
        pool = self.memory.allocate(layout.block_bytes * blocks)
        pool.reshape(-1, len(pattern))[:] = np.frombuffer(pattern, dtype=np.uint8)
        self.bytes = pool.data

    def call(self, fn: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(fn(self))
        return future

    def import_begin(self, request: EngineRequest, num_tokens: int, ahead_tokens: int = 0) -> ImportTicket:
        ids = tuple(range(len(request.prompt) // BLOCK_TOKENS))
        return ImportTicket(request_id=request.request_id, epoch=request.epoch, block_ids=ids, reused_blocks=self._reused)

    def import_commit(
        self, request_id: str, epoch: int, next_token_ids: tuple[int, ...], num_tokens: int | None = None, exact: bool = True
    ) -> None: ...

    def import_abort(self, request_id: str, epoch: int) -> bool:
        self.imports_dropped += 1
        return True

    def _start(self, block_id: int, group: int) -> int:
        return block_id * self.layout.block_bytes + group * self.layout.group_bytes(0)

    def export_kv(self, block_id: int, group: int) -> memoryview:
        start = self._start(block_id, group)
        return self.bytes[start : start + self.layout.group_bytes(group)].toreadonly()

    def import_kv(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        start = self._start(block_id, group) + offset_bytes
        written = self.bytes[start : start + data.nbytes]
        np.frombuffer(written, dtype=np.uint8)[:] = np.frombuffer(data, dtype=np.uint8)
        return written.toreadonly()

    def import_room(self, places: tuple[KvPlace, ...]) -> OpenRoom | None:
        return OpenRoom(
            [self.bytes[(at := self._start(p.block_id, p.group) + p.offset_bytes) : at + p.size_bytes] for p in places]
        )


@dataclass(frozen=True)
class OpenRoom:
    """A KvRoom whose blocks are never closed."""

    views: list[memoryview]

    def write(self, fill: Callable[[], int]) -> int:
        return fill()


class Hooks:
    """ReceiverHooks that expect these requests and commit them at once."""

    def __init__(self, layout: KvLayout, *requests: EngineRequest) -> None:
        self._layout = layout
        self._requests = {request.request_id: request for request in requests}
        self.arrivals: list[Arrived] = []
        self.errors: list[AutanError] = []

    def here(self) -> Addressee:
        return Addressee(instance_id="d", incarnation=1, fingerprint=FINGERPRINT, layout=self._layout, vocab_size=8)

    async def expect(self, request_id: str, epoch: int) -> Expectation:
        return Expectation(request=self._requests[request_id], source_instance="p", source_incarnation=1)

    def is_expected(self, request_id: str, epoch: int) -> bool:
        return True

    async def commit(self, request_id: str, epoch: int) -> None: ...

    def opened(self, request_id: str, epoch: int) -> None: ...

    def arrived(self, sequence: Arrived) -> None:
        self.arrivals.append(sequence)

    def ended(self, request_id: str, epoch: int, error: AutanError) -> None:
        self.errors.append(error)
