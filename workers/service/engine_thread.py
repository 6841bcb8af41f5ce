"""The engine and the one thread that it lives on; implements workers.kv_transfer.port.EnginePort.

The thread alternates between commands and steps. Between two steps every waiting command runs, in order; results go to the
event loop in order, commands' and steps' alike. Blocks of sequences that are handed over are pinned on this thread before
the loop hears of the step, so that their transfer starts while the next step computes.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from protos.contract.errors import EngineFailure, StaleEpoch
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.protocol import Engine, KvRoom
from workers.engine_api.types import (
    CacheEvent,
    DiskAudit,
    EngineRequest,
    KvLayout,
    KvPlace,
    LayerProgress,
    PrefixTicket,
    StepResult,
)
from workers.service.failpoints import Failpoints

logger = logging.getLogger(__name__)

T = TypeVar("T")
RequestKey = tuple[str, int]

_MAX_UNSEEN_STEPS = 64
_STOP_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One step as the event loop hears of it; `blocks` are the pinned block ids of the sequences to hand over.

    An event with `stored` comes before that of its step: the chunks there are final in all layers, while the last layer still
    attends. `ended_s` is monotonic time: when the engine was done with the step, which took `took_s`.
    """

    result: StepResult
    blocks: dict[RequestKey, tuple[int, ...]] = field(default_factory=dict)
    stored: tuple[LayerProgress, ...] = ()
    ended_s: float = 0.0
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Command:
    run: Callable[[Engine], Any]
    future: asyncio.Future[Any]


class _Wake:
    """A command that does nothing but look for work."""


class EngineThread:
    """Runs one engine. Everything but the thread's own loop is called on the event loop."""

    def __init__(
        self,
        on_step: Callable[[StepEvent], None],
        on_death: Callable[[BaseException], None],
        failpoints: Failpoints,
        share_pool: bool = False,
    ) -> None:
        self.memory = PoolMemory(shared=share_pool)  # for the engine's pool; closed with it
        self._on_step = on_step
        self._on_death = on_death
        self._failpoints = failpoints
        self._commands: queue.SimpleQueue[_Command | _Wake | None] = queue.SimpleQueue()
        self._unseen = threading.BoundedSemaphore(_MAX_UNSEEN_STEPS)
        self._on_cache: Callable[[tuple[CacheEvent, ...]], None] = _unheard
        self._handing_over: set[RequestKey] = set()  # touched on the engine's thread only
        self._busy_since_s: float | None = None
        self._stopping = False  # no new commands
        self._over = False  # all commands are done
        self._dead: BaseException | None = None
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def start(self, make: Callable[[], Engine]) -> Engine:
        """Builds the engine on its thread and starts stepping. Raises what `make` raises."""
        self._loop = asyncio.get_running_loop()
        made: asyncio.Future[Engine] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(make, made), name="autan-engine", daemon=True)
        self._thread.start()
        self._engine = await made
        return self._engine

    async def stop(self, timeout_s: float) -> None:
        """Ends the thread after what was called before and frees the device; a step that hangs is left behind. Idempotent."""
        self._stopping = True
        self._commands.put(None)
        thread = self._thread
        if thread is not None:
            await asyncio.to_thread(thread.join, timeout_s)

    def hear_cache(self, on_cache: Callable[[tuple[CacheEvent, ...]], None]) -> None:
        """From now on `on_cache` hears, on the event loop, every change of the prefix cache, in order; it is the only one."""
        self._on_cache = on_cache

    @property
    def engine(self) -> Engine:
        """The engine; for constants and for what may be called from any thread."""
        assert self._engine is not None, "start() first"
        return self._engine

    @property
    def layout(self) -> KvLayout:
        """How KV bytes lie in a block; constant."""
        return self.engine.layout

    def stalled_s(self) -> float:
        """How long the running step or command takes already; zero when idle. Infinite when the engine is gone."""
        if self._dead is not None:
            return float("inf")
        since = self._busy_since_s
        return 0.0 if since is None else time.monotonic() - since

    def call(self, fn: Callable[[Engine], T]) -> asyncio.Future[T]:
        """See EnginePort.call."""
        assert self._loop is not None, "start() first"
        future: asyncio.Future[T] = self._loop.create_future()
        if self._dead is not None or self._stopping:
            future.set_exception(EngineFailure("the engine is gone"))
            future.exception()
        else:
            self._commands.put(_Command(fn, future))
        return future

    def post(self, fn: Callable[[Engine], object]) -> None:
        """As `call`, for when nobody waits for the outcome."""
        self.call(fn).add_done_callback(_forget)

    def add(self, request: EngineRequest, hand_over: bool) -> asyncio.Future[None]:
        """Engine.add; with `hand_over` every step event carries the sequence's pinned blocks until `let_go`."""

        def run(engine: Engine) -> None:
            engine.add(request)
            if hand_over:
                self._handing_over.add((request.request_id, request.epoch))

        return self.call(run)

    def watch(self, request_id: str, epoch: int) -> asyncio.Future[None]:
        """From now on every step event of a sequence that is here carries its pinned blocks, until `let_go` or `keep`."""

        def run(engine: Engine) -> None:
            engine.pin(request_id, epoch)
            self._handing_over.add((request_id, epoch))

        return self.call(run)

    def keep(self, request_id: str, epoch: int) -> asyncio.Future[None]:
        """Ends the pinning; a paused sequence decodes on. Idempotent."""

        def run(engine: Engine) -> None:
            self._handing_over.discard((request_id, epoch))
            engine.unpin(request_id, epoch)
            engine.resume(request_id, epoch)

        return self.call(run)

    def let_go(self, request_id: str, epoch: int) -> asyncio.Future[None]:
        """Ends the pinning and whatever is left of the sequence at this epoch. Idempotent."""

        def run(engine: Engine) -> None:
            self._handing_over.discard((request_id, epoch))
            engine.unpin(request_id, epoch)
            if not engine.release(request_id, epoch):
                engine.abort(request_id, epoch)

        return self.call(run)

    def recall(self, names: Sequence[bytes], wait_s: float, lent: asyncio.Future[PrefixTicket]) -> asyncio.Future[int]:
        """Engine.recall_prefix; `lent` gets the ticket, unless the engine dies first."""
        return self.call(lambda engine: engine.recall_prefix(names, wait_s, partial(self._tell, _succeed, lent)))

    def audit_disk(self, max_blocks: int, seed: int) -> asyncio.Future[DiskAudit]:
        """Engine.audit_disk. Never done when the disk hangs, or the engine dies meanwhile."""
        assert self._loop is not None, "start() first"
        told: asyncio.Future[DiskAudit] = self._loop.create_future()
        self.post(lambda engine: engine.audit_disk(max_blocks, seed, partial(self._tell, _succeed, told)))
        return told

    def export_kv(self, block_id: int, group: int) -> memoryview:
        """See Engine.export_kv."""
        return self.engine.export_kv(block_id, group)

    def import_kv(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        """See Engine.import_kv."""
        return self.engine.import_kv(block_id, group, offset_bytes, data)

    def import_room(self, places: tuple[KvPlace, ...]) -> KvRoom | None:
        """See Engine.import_room."""
        return self.engine.import_room(places)

    # -- on the engine's thread -----------------------------------------------------------------------------------------

    def _run(self, make: Callable[[], Engine], made: asyncio.Future[Engine]) -> None:
        try:
            engine = make()
        except BaseException as error:
            self._dead = error
            self.memory.close()
            self._tell(_fail, made, error)
            return
        self._tell(_succeed, made, engine)
        engine.on_wake(lambda: self._commands.put(_Wake()))
        try:
            while not self._over:
                self._turn(engine)
        except BaseException as error:
            logger.exception("the engine is lost")
            self._dead = error
            self._tell(self._on_death, error)
        finally:
            self._busy_since_s = None
            self._refuse_waiting()
            engine.close()
            self.memory.close()

    def _turn(self, engine: Engine) -> None:
        """All waiting commands, then one step; waits for a command when there is no work."""
        while self._do_next_command(engine, wait=False):
            pass
        self._tell_cache(engine)
        if self._over:
            return
        began_s = self._busy_since_s = time.monotonic()
        if engine.has_work():
            result = engine.step(partial(self._on_layers, engine) if self._handing_over else None)
            ended_s = time.monotonic()
            event = StepEvent(result, self._pin(engine, result), ended_s=ended_s, took_s=ended_s - began_s)
            self._tell_cache(engine)
            if self._make_room():
                self._tell(self._see, event)
        else:
            self._busy_since_s = None
            self._do_next_command(engine, wait=True, limit_s=engine.idle_limit_s())

    def _do_next_command(self, engine: Engine, wait: bool, limit_s: float | None = None) -> bool:
        try:
            command = self._commands.get(block=wait, timeout=limit_s)
        except queue.Empty:
            return False
        if isinstance(command, _Wake):
            return True
        if command is None:
            self._over = True
            return False
        self._busy_since_s = time.monotonic()
        try:
            value = command.run(engine)
        except Exception as error:
            self._tell(_fail, command.future, error)
        else:
            self._tell(_succeed, command.future, value)
        return True

    def _tell_cache(self, engine: Engine) -> None:
        events = engine.drain_cache_events()
        if events:
            self._tell(self._on_cache, events)

    def _on_layers(self, engine: Engine, reports: tuple[LayerProgress, ...]) -> None:
        """Full blocks of a chunk may go as soon as its last layer is stored, which is well before its step ends."""
        stored = tuple(report for report in reports if report.groups == engine.layout.num_groups)
        blocks: dict[RequestKey, tuple[int, ...]] = {}
        for report in stored:
            self._pin_one(engine, (report.request_id, report.epoch), blocks)
        if blocks:
            self._tell(self._on_step, StepEvent(StepResult(), blocks, stored))

    def _pin(self, engine: Engine, result: StepResult) -> dict[RequestKey, tuple[int, ...]]:
        blocks: dict[RequestKey, tuple[int, ...]] = {}
        for progress in result.progress:
            self._failpoints.reach_blocking("prefill.chunk")
            self._pin_one(engine, (progress.request_id, progress.epoch), blocks)
        for token in result.tokens:
            key = (token.request_id, token.epoch)
            if key in self._handing_over:
                self._pin_one(engine, key, blocks)
            else:
                self._failpoints.reach_blocking("decode.token", token.index)
        return blocks

    def _pin_one(self, engine: Engine, key: RequestKey, blocks: dict[RequestKey, tuple[int, ...]]) -> None:
        if key in self._handing_over and key not in blocks:
            with suppress(StaleEpoch):  # it failed in this very step
                blocks[key] = engine.pin(*key)

    def _make_room(self) -> bool:
        """Waits until the event loop has seen enough of the earlier steps; False when the thread is to stop instead."""
        while not self._unseen.acquire(timeout=_STOP_POLL_S):
            if self._stopping:
                return False
        return True

    def _see(self, event: StepEvent) -> None:
        self._unseen.release()
        self._on_step(event)

    def _refuse_waiting(self) -> None:
        with suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if isinstance(command, _Command):
                    self._tell(_fail, command.future, EngineFailure("the engine is gone"))

    def _tell(self, fn: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(fn, *args)


def _unheard(events: tuple[CacheEvent, ...]) -> None:
    """Nobody wants to know."""


def _succeed(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _forget(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
