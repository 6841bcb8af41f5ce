"""Our sender and receiver between two processes, without an engine.

`python -m tests.bench.kv.wire [BLOCK_KIB BLOCKS FRAME_KIB STREAMS [ROUNDS]]` prints one JSON line: GB/s from the first
open to the commit, CPU seconds per GB of both sides, and the GB/s of a raw socket; medians of rounds that alternate. Integrity
is on. `grpc`, `shared` or `tls` before the numbers takes that way instead of the port for Push. A first hand-off of at most
32 MB is not measured: in a worker, messages use memory that earlier ones have used, and pools are mapped once.
"""

from __future__ import annotations

import asyncio
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from enum import StrEnum
from pathlib import Path

import grpc.aio

from orchestrator.cli.lab_ca import LabCa
from protos.contract.identity import PeerGate, PeerIdentity, PeerRole
from protos.rpc import DEFAULT_MESSAGE_BYTES, Dialer, GuardInterceptor, server_options
from protos.tls import Certificates
from protos.tls_files import TlsFiles
from protos.wire import common
from tests.bench.kv import raw_socket
from tests.support.kv_memory import BLOCK_TOKENS, FINGERPRINT, Hooks, MemoryPool, request_of
from workers.engine_api.types import EngineRequest, KvLayout
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.handoff_job import Ending, HandoffJob, HandoffResult, Holder, SendContext
from workers.kv_transfer.hooks import ReceiveLimits
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.memory import keep_freed_memory
from workers.kv_transfer.receiver import Receiver
from workers.kv_transfer.sender import Handoff
from workers.service.push_wire import PushDialer, push_server
from workers.service.servicers import KvTransferService, add_kv_transfer

_WORKER = PeerIdentity("bench", PeerRole.WORKER)
_LAYER_BYTES = 64 * 1024
_WINDOW_BYTES = 8 * 1024 * 1024
MOST_STREAMS = 16
_WARMING_KIB = 32 * 1024
_CONTENT, _BLANK = bytes(range(256)), b"\xff" * 256  # either way every page is touched before the clock starts


class Way(StrEnum):
    """How the bytes travel."""

    TCP = "tcp"
    GRPC = "grpc"  # plain TCP, by grpcio
    TLS = "tls"
    SHARED = "shared"


def layout_of(block_kib: int) -> KvLayout:
    """Blocks of `block_kib`, a multiple of 64, in layers of 64 KiB."""
    layers = block_kib * 1024 // _LAYER_BYTES
    row_bytes = _LAYER_BYTES // BLOCK_TOKENS
    return KvLayout(block_tokens=BLOCK_TOKENS, num_layers=layers, row_bytes=row_bytes, dtype="bytes", name="bench")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _certificates(directory: str) -> Certificates | None:
    """Those of a worker, as the product has them, made on first use; none without a directory."""
    if not directory:
        return None
    if not (Path(directory) / "ca.pem").exists():
        LabCa.create(Path(directory), _WORKER.cluster).issue(PeerRole.WORKER)
    files = TlsFiles(*(Path(directory) / name for name in ("ca.pem", "worker.pem", "worker.key")))
    return Certificates(files, time.time, _WORKER)


async def receive(block_kib: int, blocks: int, tls_dir: str, shared: bool) -> None:
    """Serves until standard input ends; prints the port first and its CPU seconds last. With TLS when there is a directory."""
    layout, certificates = layout_of(block_kib), _certificates(tls_dir)
    limits = ReceiveLimits(
        window_bytes=_WINDOW_BYTES, streams=MOST_STREAMS, progress_timeout_s=10.0, remember_s=10.0, shared_memory=True
    )
    pool, hooks, ledger = MemoryPool(layout, blocks, _BLANK), Hooks(layout, *_requests(block_kib, blocks, shared)), Ledger()
    receiver = Receiver(port=pool, hooks=hooks, ledger=ledger, counters=TransferCounters(), limits=limits)
    gate = PeerGate(_WORKER.cluster) if certificates else None
    server = grpc.aio.server(interceptors=[GuardInterceptor(gate=gate)], options=server_options())
    pushes = push_server(receiver, receiver, DEFAULT_MESSAGE_BYTES, 10.0)
    add_kv_transfer(KvTransferService(receiver, 0 if certificates else pushes.listen("127.0.0.1")), server)
    at = "127.0.0.1:0"
    print(
        server.add_secure_port(at, certificates.server_credentials()) if certificates else server.add_insecure_port(at),
        flush=True,
    )
    await server.start()
    await asyncio.to_thread(sys.stdin.readline)
    before_s = _cpu_s()
    print(flush=True)
    await asyncio.to_thread(sys.stdin.read)
    used_s = _cpu_s() - before_s
    assert not hooks.errors, hooks.errors
    assert pool.bytes == bytearray(_CONTENT) * (len(pool.bytes) // len(_CONTENT))
    print(used_s, flush=True)
    await pushes.close()
    await server.stop(0)


def _requests(block_kib: int, blocks: int, shared: bool) -> tuple[EngineRequest, EngineRequest]:
    """The one that is not measured and the one that is."""
    first_blocks = blocks if shared else max(1, min(blocks, _WARMING_KIB // block_kib))
    return request_of(first_blocks, "first"), request_of(blocks)


async def send(
    port: int, block_kib: int, blocks: int, frame_kib: int, streams: int, begin: Callable[[], None], tls_dir: str, way: Way
) -> tuple[float, float, int]:
    """Hands all blocks over. Seconds, CPU seconds of this side, bytes. `begin` tells the receiver that it is measured now."""

    async def holder_of(request_id: str) -> Holder | None:
        return None

    async def reach(point: str) -> None: ...

    shared = way is Way.SHARED
    pool, counters = MemoryPool(layout_of(block_kib), blocks, _CONTENT, shared=shared), TransferCounters()
    context = SendContext(
        port=pool, holder_of=holder_of, counters=counters, segment=lambda: pool.memory.segment,
        frame_bytes=frame_kib * 1024, streams=streams, stream_bytes=1024, progress_timeout_s=10.0, open_patience_s=5.0,
        engine_alive=lambda: True, reach=reach,
        on_progress=lambda request_id, epoch: None, dial=None if way is Way.GRPC else PushDialer(),
    )  # fmt: skip
    certificates = _certificates(tls_dir)
    dialer = Dialer(trust=certificates.trust(_WORKER) if certificates else None)
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(dialer.open(f"127.0.0.1:{port}")) for _ in range(streams)]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        first, measured = _requests(block_kib, blocks, shared)
        await _hand_over(first, channels, context)
        begin()
        started_s, before_s = time.monotonic(), _cpu_s()
        result = await _hand_over(measured, channels, context)
        assert (counters.kv_bytes_mapped == counters.kv_bytes_sent) is shared
        return time.monotonic() - started_s, _cpu_s() - before_s, result.bytes


async def _hand_over(request: EngineRequest, channels: list[grpc.aio.Channel], context: SendContext) -> HandoffResult:
    job = HandoffJob(
        request=request, source_instance="p", source_incarnation=1, target_instance="d", target_incarnation=1,
        fingerprint=FINGERPRINT,
    )  # fmt: skip
    handoff = Handoff(job, channels.__getitem__, context, "127.0.0.1")
    ending = Ending(
        next_token_ids=(1,), first_output_index=0, timeline=common.Timeline(), prefill_ended_s=time.monotonic()
    )  # fmt: skip
    handoff.end(ending, tuple(range(handoff.num_blocks)))
    return await handoff.run()


def measure_rounds(
    block_kib: int, blocks: int, frame_kib: int, streams: int = 1, rounds: int = 1, way: Way = Way.TCP
) -> dict[str, float]:
    """Medians of ours and of a raw socket, in turns."""
    found = []
    for _ in range(rounds):
        raw = raw_socket.measure(block_kib * 1024, blocks)
        found.append(measure(block_kib, blocks, frame_kib, streams, way) | {"raw_gb_per_s": raw})
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return medians | {"share_of_raw": medians["gb_per_s"] / medians["raw_gb_per_s"]}


def measure(block_kib: int, blocks: int, frame_kib: int, streams: int, way: Way = Way.TCP) -> dict[str, float]:
    """One hand-off between two processes. As in a worker, freed memory is kept."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        return _measure(block_kib, blocks, frame_kib, streams, directory if way is Way.TLS else "", way)


def _measure(block_kib: int, blocks: int, frame_kib: int, streams: int, tls_dir: str, way: Way) -> dict[str, float]:
    _certificates(tls_dir)
    command = [
        sys.executable,
        "-m",
        "tests.bench.kv.wire",
        "receive",
        str(block_kib),
        str(blocks),
        tls_dir,
        "1" if way is Way.SHARED else "",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        port = int(child.stdout.readline())
        inward, outward = child.stdin, child.stdout

        def begin() -> None:
            inward.write("begin\n")
            inward.flush()
            outward.readline()

        elapsed_s, sent_s, size = asyncio.run(send(port, block_kib, blocks, frame_kib, streams, begin, tls_dir, way))
        child.stdin.close()
        received_s = float(child.stdout.readline())
    gigabytes = size / 1e9
    return {
        "block_kib": block_kib, "frame_kib": frame_kib, "streams": streams, "gb_per_s": gigabytes / elapsed_s,
        "send_cpu_s_per_gb": sent_s / gigabytes, "receive_cpu_s_per_gb": received_s / gigabytes,
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["receive"]:
        keep_freed_memory()
        asyncio.run(receive(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], bool(sys.argv[5])))
    else:
        named = Way(sys.argv[1]) if sys.argv[1:2] and sys.argv[1] in list(Way) else None
        numbers = sys.argv[1 if named is None else 2 :] or ["1024", "256", "1024", "4"]
        print(json.dumps(measure_rounds(*map(int, numbers), way=named or Way.TCP)))
