"""The gRPC services of a worker: thin, everything is decided elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from protos.health import HealthServicer
from protos.rpc import kv_pb2_grpc, worker_pb2_grpc
from protos.wire import audit, kv, worker
from workers.kv_transfer.push_codec import PushMessage, decode_push
from workers.kv_transfer.receiver import Receiver
from workers.service.cache_feed import CacheFeed
from workers.service.diagnosis import Diagnosis
from workers.service.group import GroupHead
from workers.service.kv_audit import KvAudit

_SERVICES = ("", "autan.v1.Worker", "autan.v1.KvTransfer", "autan.v1.PrefixTransfer")


class KvTransferService(kv_pb2_grpc.KvTransferServicer):  # type: ignore[misc, unused-ignore]
    """autan.v1.KvTransfer over a receiver."""

    def __init__(self, receiver: Receiver, push_port: int = 0) -> None:
        self._receiver = receiver
        self._push_port = push_port

    async def Open(self, request: kv.OpenRequest, context: Any) -> kv.OpenReply:
        reply = await self._receiver.open(request)
        if reply.transfer_id:
            reply.push_port = self._push_port
        return reply

    async def Push(self, request_iterator: AsyncIterator[PushMessage], context: Any) -> AsyncIterator[kv.PushReply]:
        async for reply in self._receiver.push(request_iterator):
            yield reply

    async def Close(self, request: kv.CloseRequest, context: Any) -> kv.CloseReply:
        await self._receiver.close(request)
        return kv.CloseReply()


def add_kv_transfers(handoffs: Receiver, prefixes: Receiver, server: grpc.aio.Server, push_port: int = 0) -> None:
    """Registers autan.v1.KvTransfer and autan.v1.PrefixTransfer, which differ in what is received. Opens name the port on which
    Push is served as well, if it is."""
    add_kv_transfer(KvTransferService(handoffs, push_port), server)
    add_kv_transfer(KvTransferService(prefixes, push_port), server, "autan.v1.PrefixTransfer")


def add_kv_transfer(service: KvTransferService, server: grpc.aio.Server, name: str = "autan.v1.KvTransfer") -> None:
    """Registers a service with the codec of `push_codec` for the messages of Push."""
    handlers: dict[str, Any] = {
        "Open": grpc.unary_unary_rpc_method_handler(service.Open, kv.OpenRequest.FromString, kv.OpenReply.SerializeToString),
        "Push": grpc.stream_stream_rpc_method_handler(service.Push, decode_push, kv.PushReply.SerializeToString),
        "Close": grpc.unary_unary_rpc_method_handler(
            service.Close, kv.CloseRequest.FromString, kv.CloseReply.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


class WorkerService(worker_pb2_grpc.WorkerServicer):  # type: ignore[misc, unused-ignore]
    """autan.v1.Worker."""

    def __init__(
        self,
        status: Callable[[], worker.WorkerStatusReply],
        group: GroupHead,
        kv_audit: KvAudit,
        diagnosis: Diagnosis,
        feed: CacheFeed,
    ) -> None:
        self._status = status
        self._group = group
        self._audit = kv_audit
        self._diagnosis = diagnosis
        self._feed = feed

    async def Status(self, request: worker.WorkerStatusRequest, context: Any) -> worker.WorkerStatusReply:
        return self._status()

    async def JoinGroup(
        self, request_iterator: AsyncIterator[worker.RankBeat], context: Any
    ) -> AsyncIterator[worker.GroupBeat]:
        async for beat in self._group.serve(request_iterator):
            yield beat

    async def ListKv(self, request: worker.WorkerListKvRequest, context: Any) -> audit.KvBooks:
        return await self._audit.list()

    async def VerifyKv(self, request: worker.WorkerVerifyKvRequest, context: Any) -> audit.KvAudit:
        return await self._audit.verify()

    async def CollectKv(self, request: worker.WorkerCollectKvRequest, context: Any) -> audit.KvCollection:
        return await self._audit.collect(request.apply, request.cache_owners)

    async def Diagnose(self, request: worker.WorkerDiagnoseRequest, context: Any) -> audit.SelfReport:
        return await self._diagnosis.report(request)

    async def WatchCache(self, request: worker.WatchCacheRequest, context: Any) -> AsyncIterator[worker.CacheNews]:
        async for news in self._feed.watch(request.incarnation, request.after_event):
            yield news


class Health:
    """grpc.health.v1: SERVING while the engine makes progress and Redis hears of the instance."""

    def __init__(self) -> None:
        self.servicer: Any = HealthServicer()
        self._serving: bool | None = None

    async def set(self, serving: bool) -> None:
        """Tells the watchers when it changed."""
        if serving == self._serving:
            return
        self._serving = serving
        codes = health_pb2.HealthCheckResponse
        for service in _SERVICES:
            await self.servicer.set(service, codes.SERVING if serving else codes.NOT_SERVING)
