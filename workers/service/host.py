"""One worker process: builds the engine, serves gRPC, registers in Redis, runs the loops, stops in order."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2_grpc

from configs.worker_spec import WorkerSpec
from protos.contract.capability import KeyFile, Keyring
from protos.contract.errors import AutanError, ConfigError, EngineFailure, ModelError
from protos.rpc import worker_pb2_grpc
from protos.wire import common, worker
from workers.engine_api.group import GroupDoor
from workers.engine_api.protocol import Engine
from workers.kv_transfer.authority import Authority
from workers.kv_wire.push_server import PushServer
from workers.service.assembly import Assembly, Base, assemble
from workers.service.build import build_head, build_share
from workers.service.engine_thread import EngineThread, StepEvent
from workers.service.failpoints import Failpoints
from workers.service.group import GroupFollower, GroupHead, end_of_share, place_of
from workers.service.identity import cache_folder, card_of, stats_of
from workers.service.inbox import Inbox, InboxContext
from workers.service.lifecycle import BROKEN_CODES, ExitCode, InstanceState
from workers.service.loading import Loading
from workers.service.membership import Membership
from workers.service.push_wire import serve_push
from workers.service.rank_share import ShareThread
from workers.service.renewals import RenewalContext, Renewals
from workers.service.servicers import Health, WorkerService, add_kv_transfers
from workers.service.store import WorkerStore
from workers.service.task_set import TaskSet
from workers.service.wire import Wire, bind_host

logger = logging.getLogger(__name__)

_REGISTER_BACKOFF_S = 0.5
_DRAIN_POLL_S = 0.02
_SERVER_GRACE_S = 0.5
_CLOSE_TIMEOUT_S = 5.0
_BROKEN_TIMEOUT_S = 0.5  # a collective with a rank that stands does not come back


class WorkerHost:
    """The life of one rank. `run` is the whole of it; `request_stop` ends it in order."""

    def __init__(self, spec: WorkerSpec, make_engine: Callable[[], Engine] | None = None) -> None:
        self.spec = spec
        self.me = Membership(instance_id=spec.instance_id)
        self.address = ""
        self.loading = Loading()
        self._make_engine = make_engine or self._build
        self._door: GroupDoor | None = None
        self._share: ShareThread | None = None
        self._following: asyncio.Task[ExitCode] | None = None
        self._failpoints = Failpoints(spec.failpoints)
        self._store = WorkerStore(spec.store_url, spec.cluster, spec.store_timeout_s)
        self._thread = EngineThread(self._on_step, self._on_engine_death, self._failpoints, spec.network.shared_memory)
        self._health = Health()
        self._tasks = TaskSet()
        self._ended: asyncio.Future[ExitCode] | None = None
        self._stopping = False
        self._server: Any = None
        self.push: PushServer | None = None  # from the start on, unless there is TLS
        self._wire: Wire | None = None
        self._parts: Assembly | None = None
        self._inbox: Inbox | None = None
        self._renewals: Renewals | None = None
        self._group: GroupHead | None = None
        self._card = common.InstanceCard()

    # -- life -----------------------------------------------------------------------------------------------------------

    async def run(self, on_serving: Callable[[], None] = lambda: None) -> ExitCode:
        """From nothing to the end; says how it ended. `on_serving` is called when the instance is registered."""
        self._ended = asyncio.get_running_loop().create_future()
        try:
            host = bind_host(self.spec)
            self._wire = Wire(self.spec)
            if self.spec.rank > 0:
                self.address = f"{host}:0"
                return await self._follow(host)
            await self._start(host)
            on_serving()
            return await asyncio.shield(self._ended)
        except (ConfigError, ModelError) as error:
            logger.error("%s cannot start: %s", self.spec.instance_id, error)
            return ExitCode.BAD_SPEC
        finally:
            await self._close()

    def request_stop(self, grace_s: float) -> None:
        """Drains for at most `grace_s`, deregisters and ends. A second call with less grace cuts the first one short."""
        self._stopping = True
        self._tasks.spawn(self._stop(grace_s))

    def end(self, code: ExitCode) -> None:
        """Ends `run`; the first code counts."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(code)

    @property
    def parts(self) -> Assembly:
        """The parts of a started worker, for status and for tests."""
        assert self._parts is not None, "not started"
        return self._parts

    @property
    def wire(self) -> Wire:
        """The sockets of a worker that runs."""
        assert self._wire is not None, "not run"
        return self._wire

    @property
    def engine(self) -> Engine:
        """The engine of a started worker; see the Engine protocol for what may be called from which thread."""
        return self._thread.engine

    def status(self) -> worker.WorkerStatusReply:
        """What the Status call answers."""
        return worker.WorkerStatusReply(
            card=self._card,
            incarnation=self.me.number,
            state=self.me.state.wire,
            stats=self._stats(),
            ledger=[entry.line() for entry in self.parts.ledger.entries()],
            pid=os.getpid(),
        )

    # -- start ----------------------------------------------------------------------------------------------------------

    def _build(self) -> Engine:
        spec = self.spec
        place = place_of(spec, bind_host(spec))
        memory, cache_dir = self._thread.memory, cache_folder(spec)
        engine, self._door = build_head(spec.model, spec.engine, self._model_dir, place, self.loading, memory, cache_dir)
        return engine

    @property
    def _model_dir(self) -> Path | None:
        return Path(self.spec.model_dir) if self.spec.model_dir else None

    async def _start(self, host: str) -> None:
        spec, timing = self.spec, self.spec.timing
        engine = await self._thread.start(self._make_engine)
        self._group = GroupHead(
            group=spec.instance_id,
            ranks=spec.ranks,
            lease_s=timing.lease_s,
            incarnation=lambda: self.me.number,
            on_broken=self._on_group_broken,
            door=self._door,
        )
        self._parts = assemble(
            Base(
                spec=spec,
                me=self.me,
                thread=self._thread,
                store=self._store,
                failpoints=self._failpoints,
                poll_inbox=lambda: self._inbox.poll_soon() if self._inbox else None,
                beat_soon=lambda: self._renewals.beat_soon() if self._renewals else None,
                authority=Authority(self._handoff_keys(), self._store.clock),
                wire=self.wire,
            )
        )
        self._renewals = self._make_renewals(self._parts)
        self._inbox = Inbox(
            self._store,
            InboxContext(
                instance_id=spec.instance_id,
                incarnation=lambda: self.me.incarnation,
                lease_s=timing.lease_s,
                handle=self._parts.coordinator.on_entry,
                on_stale=self._renewals.beat_soon,
            ),
        )
        await self._serve(host)
        self._card = card_of(spec, engine, self.address)
        await self._register()
        for loop in (self._inbox.run(), self._renewals.run(), self._parts.receiver.run(), self._watch_health()):
            self._tasks.spawn(self._guard(loop))

    def _handoff_keys(self) -> Callable[[], Keyring] | None:
        """Raises ConfigError for keys that cannot be used."""
        if self.spec.handoff_keys_file is None:
            return None
        file = KeyFile(Path(self.spec.handoff_keys_file))
        return lambda: file.keys

    def _make_renewals(self, parts: Assembly) -> Renewals:
        return Renewals(
            RenewalContext(
                me=self.me,
                store=self._store,
                assignments=parts.assignments,
                coordinator=parts.coordinator,
                engine=self._thread,
                outbox=parts.outbox,
                stats=lambda: self._stats().SerializeToString(),
                timing=self.spec.timing,
                stopping=lambda: self._stopping,
                on_fenced=self._on_fenced,
                on_exit=self.end,
            )
        )

    async def _serve(self, host: str) -> None:
        assert self._group is not None
        self._server = self.wire.server()
        add_worker: Any = worker_pb2_grpc.add_WorkerServicer_to_server
        parts = self.parts
        self.push = serve_push(self.spec, parts.receiver, parts.prefixes.receiver, host)
        add_kv_transfers(parts.receiver, parts.prefixes.receiver, self._server, 0 if self.push is None else self.push.port)
        add_worker(WorkerService(self.status, self._group, parts.audit, parts.diagnosis, parts.prefixes.feed), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._server)
        self.address = self.wire.listen(self._server, host)
        await self._health.set(False)
        await self._server.start()

    async def _register(self) -> None:
        """Registers as the next incarnation, as soon as Redis answers."""
        spec = self.spec
        assert self._renewals is not None
        while True:
            sent_s = time.monotonic()
            try:
                incarnation = await self._store.register(
                    spec.instance_id, spec.role, self.address, self._card.SerializeToString()
                )
                break
            except AutanError as error:
                logger.warning("%s cannot register: %s", spec.instance_id, error)
                await asyncio.sleep(_REGISTER_BACKOFF_S)
        self.me.incarnation = incarnation
        self._failpoints.now_incarnation(incarnation)
        self._renewals.registered(sent_s)
        logger.info("%s is incarnation %d at %s", spec.instance_id, incarnation, self.address)
        self._tasks.spawn(self._become_ready(incarnation))

    async def _become_ready(self, incarnation: int) -> None:
        assert self._group is not None and self._renewals is not None
        await self._group.wait_complete()
        door = self._door
        if door is not None:
            try:
                await self._thread.call(lambda engine: door.connect())
            except EngineFailure as error:
                logger.error("the ranks of %s do not connect: %s", self.spec.instance_id, error)
                self.end(ExitCode.GROUP_BROKEN)
                return
        if self.me.incarnation == incarnation and self.me.state is InstanceState.STARTING:
            self.me.lifecycle.move(InstanceState.DRAINING if self._stopping else InstanceState.READY)
            self._renewals.beat_soon()

    async def _register_again(self, fenced: int) -> None:
        """After a fence: once the engine has let everything go, the instance lives on as its next incarnation."""
        try:
            await self._thread.call(lambda engine: None)
        except EngineFailure:
            self.end(ExitCode.ENGINE_LOST)
            return
        await self.parts.receiver.settle()
        if self._renewals is None or await self._renewals.ends_as_superseded(fenced):
            return
        self.me.lifecycle.move(InstanceState.STARTING)
        await self._register()

    async def _follow(self, host: str) -> ExitCode:
        spec = self.spec
        place = place_of(spec, host)
        share = self._share = ShareThread(
            lambda: build_share(spec.model, spec.engine, self._model_dir, place, self.loading), self._on_share_end
        )
        share.start()
        following = asyncio.create_task(GroupFollower(spec, self._store, self.wire.peers, share).run())
        self._following = following
        assert self._ended is not None
        await asyncio.wait({following, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            return self._ended.result()
        self.end(ExitCode.STOPPED if self._stopping else following.result())
        return self._ended.result()

    def _on_share_end(self, error: BaseException | None) -> None:
        if error is None:
            return  # rank 0 ended the group: its stream ends as well
        logger.error("rank %d of %s cannot compute: %s", self.spec.rank, self.spec.instance_id, error, exc_info=error)
        self.end(end_of_share(error))

    # -- while it runs --------------------------------------------------------------------------------------------------

    def _on_step(self, event: StepEvent) -> None:
        try:
            self.parts.coordinator.on_step(event)
        except Exception:
            logger.exception("an engine step could not be carried out")
            self.end(ExitCode.FAILED)

    def _on_engine_death(self, error: BaseException) -> None:
        logger.error("the engine is lost: %s", error)
        self.end(ExitCode.GROUP_BROKEN if self._door is not None and isinstance(error, EngineFailure) else ExitCode.ENGINE_LOST)

    def _on_fenced(self, incarnation: int) -> None:
        self._tasks.spawn(self._register_again(incarnation))

    def _on_group_broken(self) -> None:
        if not self._stopping:
            self.end(ExitCode.GROUP_BROKEN)

    async def _guard(self, loop: Any) -> None:
        try:
            await loop
        except Exception:
            logger.exception("a loop of the worker ended")
            self.end(ExitCode.FAILED)

    async def _watch_health(self) -> None:
        timing = self.spec.timing
        assert self._renewals is not None
        while True:
            heard = self._renewals.silent_s < timing.lease_s
            computing = self._thread.stalled_s() < timing.progress_timeout_s
            serving = heard and computing and self.me.state in (InstanceState.READY, InstanceState.DRAINING)
            await self._health.set(serving)
            await asyncio.sleep(timing.heartbeat_s / 2)

    def _stats(self) -> common.InstanceStats:
        parts = self.parts
        overdue = parts.ledger.leaked_blocks(time.monotonic())
        return stats_of(self.engine.stats(), parts.counters, overdue, parts.outbox.unacked_tokens, parts.prefixes)

    # -- stop -----------------------------------------------------------------------------------------------------------

    async def _stop(self, grace_s: float) -> None:
        if self._following is not None:
            # Rank 0 may still need this rank for what it drains.
            await asyncio.wait({self._following}, timeout=grace_s)
            self.end(ExitCode.STOPPED)
            return
        if self.me.state in (InstanceState.STARTING, InstanceState.READY):
            self.me.lifecycle.move(InstanceState.DRAINING)
        if self._renewals is not None:
            self._renewals.beat_soon()
        for _ in range(int(grace_s / _DRAIN_POLL_S)):
            if self._parts is None or not len(self._parts.assignments):
                break
            await asyncio.sleep(_DRAIN_POLL_S)
        self.end(ExitCode.STOPPED)

    async def _close(self) -> None:
        """Gives everything back, whatever state the start reached, as far as a hung engine lets it."""
        broken = self._ended is not None and self._ended.done() and self._ended.result() in BROKEN_CODES
        patience_s = _BROKEN_TIMEOUT_S if broken else _CLOSE_TIMEOUT_S
        await self._tasks.cancel()
        if self._share is not None:
            await self._share.stop(patience_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._give_back()
        if self.me.incarnation is not None:
            with suppress(AutanError):
                await self._store.deregister(self.me.instance_id, self.me.incarnation)
        if self.me.lifecycle.may(InstanceState.STOPPED):
            self.me.lifecycle.move(InstanceState.STOPPED)
        if self.push is not None:
            await self.push.close()
        if self._server is not None:
            await self._server.stop(_SERVER_GRACE_S)
        await self._thread.stop(patience_s)
        await self._store.close()

    async def _give_back(self) -> None:
        parts = self._parts
        if parts is None:
            return
        parts.coordinator.drop_all()
        await parts.moves.close()
        await parts.handoffs.close()
        await parts.receiver.settle()
        await parts.coordinator.close()
        await parts.failures.close()
        await parts.outbox.close()
