"""Every RPC of the product, from the descriptors of its protos, and a call of any of them that shows whether it is let in."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from protos.wire import admin, audit, common, inference, kv, store, tokens, worker

_FILES = (admin, audit, common, inference, kv, store, tokens, worker, health_pb2)
_CALL_S = 10.0
_HEALTH = "grpc.health.v1.Health"

LISTENERS = {
    "worker": {"autan.v1.Worker", "autan.v1.KvTransfer", "autan.v1.PrefixTransfer", _HEALTH},
    "orchestrator": {"autan.v1.Inference", "autan.v1.Admin", _HEALTH},
    "sink": {"autan.v1.TokenSink"},
}
"""The listeners of a cluster and the services on each."""


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC as its descriptor has it."""

    service: str
    path: str
    client_streams: bool
    server_streams: bool


def every_method() -> list[Method]:
    """All of them: those of our own services and of health."""
    return [
        Method(service.full_name, f"/{service.full_name}/{one.name}", one.client_streaming, one.server_streaming)
        for file in _FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for one in service.methods
    ]


async def outcome(channel: grpc.aio.Channel, method: Method) -> tuple[grpc.StatusCode, str]:
    """What a call without content comes to: OK when something is answered, else the status and its text."""

    try:
        if method.client_streams:
            streams = channel.stream_stream(method.path)(timeout=_CALL_S)
            with suppress(grpc.aio.BaseError):  # it has failed already: the read says how
                await streams.done_writing()
            await streams.read()
        elif method.server_streams:
            call = channel.unary_stream(method.path)(b"", timeout=_CALL_S)
            await call.read()
            call.cancel()
        else:
            await channel.unary_unary(method.path)(b"", timeout=_CALL_S)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""
