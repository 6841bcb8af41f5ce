"""Both sides of the KV plane without an engine: a pool in plain memory, and a process that expects one request."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Callable
from typing import Any

from protos.contract.errors import AutanError
from protos.wire import common
from workers.engine_api.types import EngineRequest, ImportTicket, KvLayout, SamplingParams
from workers.kv_transfer.claims import Addressee, Expectation
from workers.kv_transfer.hooks import Arrived

BLOCK_TOKENS = 64
FINGERPRINT = common.Fingerprint(model="m", block_tokens=BLOCK_TOKENS)


def request_of(blocks: int) -> EngineRequest:
    """A request whose prompt fills so many blocks."""
    return EngineRequest(request_id="r", epoch=1, prompt=(1,) * (blocks * BLOCK_TOKENS), sampling=SamplingParams(max_tokens=1))


class MemoryPool:
    """EnginePort over plain memory; blocks have the ids of their places in the sequence, and `reused` of them are there."""

    def __init__(self, layout: KvLayout, blocks: int, pattern: bytes, reused: int = 0) -> None:
        self.layout = layout
        self.imports_dropped = 0
        self._blocks = blocks
        self._reused = reused
        self.bytes = memoryview(bytearray(pattern) * (layout.block_bytes * blocks // len(pattern)))

    def call(self, fn: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(fn(self))
        return future

    def import_begin(self, request: EngineRequest, num_tokens: int, ahead_tokens: int = 0) -> ImportTicket:
        ids = tuple(range(self._blocks))
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

    def import_kv(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> None:
        start = self._start(block_id, group) + offset_bytes
        self.bytes[start : start + data.nbytes] = data


class Hooks:
    """ReceiverHooks that expect one request and commit it at once."""

    def __init__(self, layout: KvLayout, request: EngineRequest) -> None:
        self._layout = layout
        self._request = request
        self.arrivals: list[Arrived] = []
        self.errors: list[AutanError] = []

    def here(self) -> Addressee:
        return Addressee(instance_id="d", incarnation=1, fingerprint=FINGERPRINT, layout=self._layout, vocab_size=8)

    async def expect(self, request_id: str, epoch: int) -> Expectation:
        return Expectation(request=self._request, source_instance="p", source_incarnation=1)

    def is_expected(self, request_id: str, epoch: int) -> bool:
        return True

    async def commit(self, request_id: str, epoch: int) -> None: ...

    def opened(self, request_id: str, epoch: int) -> None: ...

    def arrived(self, sequence: Arrived) -> None:
        self.arrivals.append(sequence)

    def ended(self, request_id: str, epoch: int, error: AutanError) -> None:
        self.errors.append(error)
