"""Push beside the gRPC server: a listener of its own for it, and how this worker reaches that of others.

Only where connections are plain: with `network.tls` everything goes through gRPC, which has the certificates.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from configs.address import parse_address
from configs.worker_spec import WorkerSpec
from protos.rpc import parsed
from protos.wire import kv
from workers.kv_transfer.body import Body
from workers.kv_transfer.push_codec import HeadScan
from workers.kv_transfer.receiver import Receiver
from workers.kv_wire.incoming import Incoming
from workers.kv_wire.push_client import PushCall, dial
from workers.kv_wire.push_server import Handler, PushServer, ServerLimits

_DIAL_TIMEOUT_S = 0.5
_AVOID_S = 60.0
_MOST_AVOIDED = 64


def host_of(address: str) -> str:
    """The host of a worker's address; empty for what is no host and port."""
    try:
        return (parse_address(address).host or "").strip("[]")
    except ValueError:
        return ""


def push_handler(receiver: Receiver, method: str) -> Handler:
    """Push of a receiver, as bytes."""

    async def serve(messages: AsyncIterator[Incoming]) -> AsyncGenerator[bytes, None]:
        async for reply in receiver.push(parsed(_heads(messages), lambda parts: parts[0].decode(*parts[1:]), method)):
            yield reply.SerializeToString()

    return serve


async def _heads(messages: AsyncIterator[Incoming]) -> AsyncIterator[tuple[HeadScan, memoryview, Body]]:
    """The head of each message, and its body, which is still on its way."""
    async for message in messages:
        scan = HeadScan(message.size_bytes)
        yield scan, await message.head(scan.measure), message


def push_server(handoffs: Receiver, prefixes: Receiver, max_message_bytes: int, idle_s: float) -> PushServer:
    """Serves Push of both services; it does not listen yet."""
    methods = {"/autan.v1.KvTransfer/Push": handoffs, "/autan.v1.PrefixTransfer/Push": prefixes}
    handlers = {method: push_handler(receiver, method) for method, receiver in methods.items()}
    return PushServer(handlers, ServerLimits(most_message_bytes=max_message_bytes, idle_s=idle_s))


def serve_push(spec: WorkerSpec, handoffs: Receiver, prefixes: Receiver, host: str) -> PushServer | None:
    """The one of a worker, on a port of `host`; none with TLS. Raises OSError."""
    if spec.network.tls is not None:
        return None
    server = push_server(handoffs, prefixes, spec.network.max_message_bytes, spec.timing.progress_timeout_s)
    server.listen(host)
    return server


class PushDialer:
    """Connects to the Push ports of others. One that could not be reached is left alone for a minute: gRPC is there too."""

    def __init__(self) -> None:
        self._avoid_until_s: dict[tuple[str, int], float] = {}

    async def __call__(self, host: str, port: int, method: str) -> PushCall[Any]:
        """A call that has begun. Raises OSError, TimeoutError among them."""
        now_s = asyncio.get_running_loop().time()
        if self._avoid_until_s.get((host, port), 0.0) > now_s:
            raise ConnectionError("not reached a moment ago")
        try:
            return await dial(host, port, method, kv.PushReply.FromString, _DIAL_TIMEOUT_S)
        except OSError:
            if len(self._avoid_until_s) >= _MOST_AVOIDED:
                self._avoid_until_s.clear()
            self._avoid_until_s[host, port] = now_s + _AVOID_S
            raise
