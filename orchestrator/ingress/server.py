"""The ingress as a server: one listener for clients and operators, one for workers, and the tasks behind them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from configs.address import Address
from configs.schema.network import NetworkConfig
from orchestrator.ingress.auth import Authoriser, load_keys
from orchestrator.ingress.listen import bind, check_exposure
from orchestrator.ingress.model import ServedModel
from orchestrator.ingress.moving import SignMove, unsigned_move
from orchestrator.ingress.parts import IngressSettings, Parts, assemble
from orchestrator.ingress.security import security_of, sink_host
from orchestrator.ingress.tasks import end_tasks
from orchestrator.store.client import Store
from protos.contract.errors import AutanError
from protos.health import HealthServicer
from protos.rpc import Dialer, GuardInterceptor, admin_pb2_grpc, inference_pb2_grpc, server_options, tokens_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE = "autan.v1.Inference"
_HEALTH_EVERY_S = 0.2
_LAST_COMMIT_S = 1.0
_SPARE_CALLS = 256  # unary calls beside the streams


class IngressServer:
    """Start it, stop it. Raises ConfigError from `start` for an address or key file that cannot be used.

    `on_shutdown(grace_s)` is called when an operator asks the cluster to stop. Where the front door has TLS the same is served
    on `local_socket`, without: commands of the user on this machine need no certificate.
    """

    def __init__(
        self,
        *,
        settings: IngressSettings,
        network: NetworkConfig,
        store: Store,
        model: ServedModel,
        on_shutdown: Callable[[float], None],
        node_address: str | None = None,
        local_socket: Path | None = None,
        sign_move: SignMove = unsigned_move,
    ) -> None:
        self._settings = settings
        self._network = network
        self._store = store
        self._model = model
        self._on_shutdown = on_shutdown
        self._node_address = node_address
        self._local_socket = local_socket
        self._sign_move = sign_move
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: Any = None
        self._workers: Any = None
        self._health: Any = None
        self._parts: Parts | None = None
        self._draining = False
        self.address = ""
        self.local_address = ""  # where commands on this machine connect: `address`, or the unix socket beside it
        self.sink_address = ""
        self.to_workers = Dialer()  # how this process reaches workers, once started

    @property
    def parts(self) -> Parts:
        """The parts, once started."""
        assert self._parts is not None, "the ingress is not started"
        return self._parts

    async def start(self) -> None:
        """Binds, registers, adopts what another ingress left, then serves. Leaves nothing behind when it raises.

        Raises StoreUnavailable when Redis cannot be reached.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop(0.0)
            raise

    async def _start(self) -> None:
        config = self._settings.config
        authorise = Authoriser() if config.keys_file is None else load_keys(Path(config.keys_file))
        security = security_of(self._store.cluster, self._network, config)
        self.to_workers = security.to_workers
        has_tls = security.clients.credentials is not None
        address = check_exposure(
            config.address, has_keys=config.keys_file is not None, has_tls=has_tls, insecure=self._network.insecure
        )
        # The client listener is bound first: who does not get the address must not take over the registration.
        self._clients = self._server(GuardInterceptor(authorise, security.clients.gate), config.max_streams + _SPARE_CALLS)
        self.address = self.local_address = bind(self._clients, address, security.clients.credentials)
        if has_tls and self._local_socket is not None and not address.path:
            self.local_address = bind(self._clients, Address(path=str(self._local_socket)))
        self._workers = self._server(GuardInterceptor(gate=security.workers.gate), None)
        sink = Address(host=sink_host(self._network, self._node_address))
        self.sink_address = bind(self._workers, sink, security.workers.credentials)
        parts = assemble(
            settings=self._settings,
            store=self._store,
            model=self._model,
            authorise=authorise,
            sink_address=self.sink_address,
            on_shutdown=self._on_shutdown,
            sign_move=self._sign_move,
            workers=security.to_workers,
            certificates=security.checks,
        )
        await parts.owner.register()
        if self._network.kv_compression != "none":
            parts.metrics.count(f"kv_compression_{self._network.kv_compression}")
        self._parts = parts
        self._health = HealthServicer()
        inference_pb2_grpc.add_InferenceServicer_to_server(parts.service, self._clients)  # type: ignore[no-untyped-call]
        admin_pb2_grpc.add_AdminServicer_to_server(parts.admin, self._clients)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._clients)
        tokens_pb2_grpc.add_TokenSinkServicer_to_server(parts.sink, self._workers)  # type: ignore[no-untyped-call]
        await self._workers.start()
        self._run("journal", parts.journal.run())
        self._run("registration", parts.owner.run())
        await parts.watch.adopt_orphans()
        self._run("watch", parts.watch.run())
        self._run("hints", parts.watch.listen())
        self._run("health", self._report_health())
        await self._clients.start()
        logger.info("clients at %s, workers at %s", self.address, self.sink_address)

    async def drain(self) -> None:
        """Takes no new requests; those that are accepted go on."""
        self._draining = True
        if self._parts is not None:
            self._parts.intake.is_draining = True
        await self._set_health()

    async def wait_idle(self, timeout_s: float) -> bool:
        """True when every accepted request has ended within the time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while len(self.parts.table):  # noqa: ASYNC110 - polled: many things end a request
                    await asyncio.sleep(0.02)
        return not len(self.parts.table)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Ends streams that are open after the grace (clients resume elsewhere or later) and stops. Idempotent.

        No request is cancelled for it.
        """
        self._draining = True
        if self._parts is not None:
            await self._parts.departures.close()
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        if self._clients is not None:
            await self._clients.stop(grace_s)
        if self._workers is not None:
            await self._workers.stop(0.0)
        await end_tasks(self._tasks)
        self._tasks.clear()
        if self._parts is not None:
            self._parts.intake.close()
            if not self._parts.journal.is_degraded:
                with suppress(AutanError, TimeoutError):
                    async with asyncio.timeout(_LAST_COMMIT_S):
                        await self._parts.journal.commit()

    def _server(self, guard: GuardInterceptor, max_calls: int | None) -> Any:
        network = self._network
        return grpc.aio.server(
            interceptors=[guard],
            options=server_options(network.max_message_bytes, network.keepalive_s, network.ping_timeout_s),
            maximum_concurrent_rpcs=max_calls,
        )

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"ingress-{name}")
        task.add_done_callback(_log_end)
        self._tasks.append(task)

    async def _report_health(self) -> None:
        while True:
            await self._set_health()
            await asyncio.sleep(_HEALTH_EVERY_S)

    async def _set_health(self) -> None:
        if self._health is None or self._parts is None:
            return
        owner = self._parts.owner
        running = not any(task.done() for task in self._tasks)
        serving = running and owner.store_reachable and not owner.is_fenced and not self._draining
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("%s ended unexpectedly", task.get_name(), exc_info=task.exception())
