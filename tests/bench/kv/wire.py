"""Our sender and receiver between two processes, without an engine.

`python -m tests.bench.kv.wire [BLOCK_KIB BLOCKS FRAME_KIB [ROUNDS]]` prints one JSON line: GB/s from the first open to the
commit, CPU seconds per GB of both sides, and the GB/s of a raw socket; medians of rounds that alternate. Integrity is on.
"""

from __future__ import annotations

import asyncio
import json
import resource
import statistics
import subprocess
import sys
import time
from asyncio import Future
from collections.abc import Callable
from typing import Any

import grpc.aio

from protos.contract.errors import AutanError
from protos.rpc import GuardInterceptor, open_channel, server_options
from protos.wire import common
from tests.bench.kv import raw_socket
from workers.engine_api.types import EngineRequest, ImportTicket, KvLayout, SamplingParams
from workers.kv_transfer.claims import Addressee, Expectation
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.handoff_job import Ending, HandoffJob, Holder, SendContext
from workers.kv_transfer.hooks import Arrived, ReceiveLimits
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.receiver import Receiver
from workers.kv_transfer.sender import Handoff
from workers.service.servicers import KvTransferService, add_kv_transfer

_LAYER_BYTES = 64 * 1024
_TOKENS = 64
_WINDOW_BYTES = 8 * 1024 * 1024
_CONTENT, _BLANK = bytes(range(256)), b"\xff" * 256  # either way every page is touched before the clock starts


def layout_of(block_kib: int) -> KvLayout:
    """Blocks of `block_kib`, a multiple of 64, in layers of 64 KiB."""
    layers = block_kib * 1024 // _LAYER_BYTES
    return KvLayout(block_tokens=_TOKENS, num_layers=layers, row_bytes=_LAYER_BYTES // _TOKENS, dtype="bytes", name="bench")


class MemoryPool:
    """EnginePort over plain memory; blocks have the ids of their places in the sequence."""

    def __init__(self, layout: KvLayout, blocks: int, pattern: bytes) -> None:
        self.layout = layout
        self._blocks = blocks
        self.bytes = memoryview(bytearray(pattern) * (layout.block_bytes * blocks // len(pattern)))

    def call(self, fn: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(fn(self))
        return future

    def import_begin(self, request: EngineRequest, num_tokens: int, ahead_tokens: int = 0) -> ImportTicket:
        ids = tuple(range(self._blocks))
        return ImportTicket(request_id=request.request_id, epoch=request.epoch, block_ids=ids, reused_blocks=0)

    def import_commit(
        self, request_id: str, epoch: int, next_token_ids: tuple[int, ...], num_tokens: int | None = None
    ) -> None: ...

    def import_abort(self, request_id: str, epoch: int) -> bool:
        return True

    def export_kv(self, block_id: int, group: int) -> memoryview:
        start = block_id * self.layout.block_bytes + group * self.layout.group_bytes(0)
        return self.bytes[start : start + self.layout.group_bytes(group)].toreadonly()

    def import_kv(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> None:
        start = block_id * self.layout.block_bytes + group * self.layout.group_bytes(0) + offset_bytes
        self.bytes[start : start + data.nbytes] = data


class Hooks:
    """ReceiverHooks that expect one request and commit it at once."""

    def __init__(self, layout: KvLayout, request: EngineRequest) -> None:
        self._layout = layout
        self._request = request

    def here(self) -> Addressee:
        fingerprint = common.Fingerprint(model="bench", block_tokens=_TOKENS)
        return Addressee(instance_id="d", incarnation=1, fingerprint=fingerprint, layout=self._layout, vocab_size=8)

    async def expect(self, request_id: str, epoch: int) -> Expectation:
        return Expectation(request=self._request, source_instance="p", source_incarnation=1)

    def is_expected(self, request_id: str, epoch: int) -> bool:
        return True

    async def commit(self, request_id: str, epoch: int) -> None: ...

    def opened(self, request_id: str, epoch: int) -> None: ...

    def arrived(self, sequence: Arrived) -> None: ...

    def ended(self, request_id: str, epoch: int, error: AutanError) -> None:
        print(f"ended: {error}", file=sys.stderr)


def _request(blocks: int) -> EngineRequest:
    return EngineRequest(request_id="r", epoch=1, prompt=(1,) * (blocks * _TOKENS), sampling=SamplingParams(max_tokens=1))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def receive(block_kib: int, blocks: int) -> None:
    """Serves until standard input ends; prints the port first and its CPU seconds last."""
    layout = layout_of(block_kib)
    limits = ReceiveLimits(window_bytes=_WINDOW_BYTES, progress_timeout_s=10.0, remember_s=10.0)
    pool, hooks, ledger = MemoryPool(layout, blocks, _BLANK), Hooks(layout, _request(blocks)), Ledger()
    receiver = Receiver(port=pool, hooks=hooks, ledger=ledger, counters=TransferCounters(), limits=limits)
    server = grpc.aio.server(interceptors=[GuardInterceptor()], options=server_options())
    add_kv_transfer(KvTransferService(receiver), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    before_s = _cpu_s()
    await asyncio.to_thread(sys.stdin.read)
    used_s = _cpu_s() - before_s
    assert pool.bytes == bytearray(_CONTENT) * (len(pool.bytes) // len(_CONTENT))
    print(used_s, flush=True)
    await server.stop(0)


async def send(port: int, block_kib: int, blocks: int, frame_kib: int) -> tuple[float, float, int]:
    """Hands all blocks over. Seconds, CPU seconds of this side, bytes."""

    async def holder_of(request_id: str) -> Holder | None:
        return None

    async def reach(point: str) -> None: ...

    layout = layout_of(block_kib)
    context = SendContext(
        port=MemoryPool(layout, blocks, _CONTENT), holder_of=holder_of, counters=TransferCounters(),
        frame_bytes=frame_kib * 1024, progress_timeout_s=10.0, open_patience_s=5.0, engine_alive=lambda: True, reach=reach,
        on_progress=lambda request_id, epoch: None,
    )  # fmt: skip
    job = HandoffJob(
        request=_request(blocks), source_instance="p", source_incarnation=1, target_instance="d", target_incarnation=1,
        fingerprint=common.Fingerprint(model="bench", block_tokens=_TOKENS),
    )  # fmt: skip
    async with open_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        handoff = Handoff(job, channel, context)
        started_s, before_s = time.monotonic(), _cpu_s()
        ending = Ending(
            next_token_ids=(1,), first_output_index=0, timeline=common.Timeline(), prefill_ended_s=started_s
        )  # fmt: skip
        handoff.end(ending, tuple(range(blocks)))
        result = await handoff.run()
        return time.monotonic() - started_s, _cpu_s() - before_s, result.bytes


def measure_rounds(block_kib: int, blocks: int, frame_kib: int, rounds: int = 1) -> dict[str, float]:
    """Medians of ours and of a raw socket, in turns."""
    found = []
    for _ in range(rounds):
        raw = raw_socket.measure(block_kib * 1024, blocks)
        found.append(measure(block_kib, blocks, frame_kib) | {"raw_gb_per_s": raw})
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return medians | {"share_of_raw": medians["gb_per_s"] / medians["raw_gb_per_s"]}


def measure(block_kib: int, blocks: int, frame_kib: int) -> dict[str, float]:
    """One hand-off between two processes."""
    command = [sys.executable, "-m", "tests.bench.kv.wire", "receive", str(block_kib), str(blocks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        port = int(child.stdout.readline())
        elapsed_s, sent_s, size = asyncio.run(send(port, block_kib, blocks, frame_kib))
        child.stdin.close()
        received_s = float(child.stdout.readline())
    gigabytes = size / 1e9
    return {
        "block_kib": block_kib, "frame_kib": frame_kib, "gb_per_s": gigabytes / elapsed_s,
        "send_cpu_s_per_gb": sent_s / gigabytes, "receive_cpu_s_per_gb": received_s / gigabytes,
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["receive"]:
        asyncio.run(receive(*map(int, sys.argv[2:])))
    else:
        print(json.dumps(measure_rounds(*map(int, sys.argv[1:] or ("1024", "256", "512")))))
