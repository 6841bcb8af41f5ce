"""The heartbeat: reports, keeps leases, and fences this worker when Redis does not hear of it any more.

    last renewal + lease - heartbeat    nothing is emitted any more; computing goes on
    last renewal + lease + KV lease     everything is dropped; the instance registers as its next incarnation

Between the two Redis may come back: what is still this instance's goes on, the rest is named in the reply and dropped.
All on the own monotonic clock, so a process that was stopped fences itself when it resumes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from configs.schema.cluster import TimingConfig
from protos.contract.errors import AutanError, EngineFailure, StaleIncarnation
from workers.service.assignments import Assignments
from workers.service.coordinator import Coordinator
from workers.service.engine_thread import EngineThread
from workers.service.lifecycle import ExitCode, InstanceState
from workers.service.membership import Membership
from workers.service.outbox import Outbox
from workers.service.store import Held, WorkerStore

logger = logging.getLogger(__name__)

_STALLED_EXIT_FACTOR = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalContext:
    """What the heartbeat reports and whom it tells."""

    me: Membership
    store: WorkerStore
    assignments: Assignments
    coordinator: Coordinator
    engine: EngineThread
    outbox: Outbox
    stats: Callable[[], bytes]
    timing: TimingConfig
    stopping: Callable[[], bool]
    on_fenced: Callable[[int], None]  # the incarnation that was
    on_exit: Callable[[ExitCode], None]


class Renewals:
    """One heartbeat of one instance."""

    def __init__(self, context: RenewalContext) -> None:
        self._context = context
        self._news = asyncio.Event()
        self._renewed_s = time.monotonic()
        self._pause: asyncio.TimerHandle | None = None
        self._told_stalled = False

    @property
    def silent_s(self) -> float:
        """Time since Redis last heard of this instance."""
        return time.monotonic() - self._renewed_s

    def beat_soon(self) -> None:
        """Beats at once instead of at the next tick."""
        self._news.set()

    def registered(self, sent_s: float) -> None:
        """A registration counts as a beat."""
        self._renewed(sent_s)

    async def run(self) -> None:
        """Beats until cancelled."""
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._context.timing.heartbeat_s):
                        await self._news.wait()
                self._news.clear()
                if self._context.me.incarnation is not None:
                    await self._beat()
                    self._check_fence()
        finally:
            if self._pause is not None:
                self._pause.cancel()

    async def _beat(self) -> None:
        context, me = self._context, self._context.me
        if self._is_stalled():
            return
        self._drop_stuck()
        incarnation, sent_s = me.number, time.monotonic()
        held = [Held(request_id=a.request_id, epoch=a.epoch, holding=a.holds) for a in context.assignments.all()]
        try:
            renewal = await context.store.renew(
                me.instance_id,
                incarnation,
                state=me.state.value,
                stats=context.stats(),
                lease_s=context.timing.lease_s,
                held=held,
            )
        except StaleIncarnation:
            await self.check_superseded(incarnation)
            return
        except AutanError as error:
            logger.warning("no renewal for %.1f s: %s", self.silent_s, error)
            return
        if me.incarnation != incarnation:
            return
        self._renewed(sent_s)
        epochs = {one.request_id: one.epoch for one in held}
        for request_id in renewal.lost:
            context.coordinator.lost(request_id, epochs[request_id])
        self._follow(renewal.want_drain)

    async def check_superseded(self, incarnation: int) -> None:
        """Redis refused this incarnation: a newer one ends the process, a lost one registers again."""
        context, me = self._context, self._context.me
        try:
            record = await context.store.instance(me.instance_id)
        except AutanError as error:
            logger.warning("incarnation %d was refused, and Redis does not say why: %s", incarnation, error)
            return
        if me.incarnation != incarnation:
            return
        if record is not None and record.incarnation > incarnation:
            logger.error("%s runs as incarnation %d elsewhere", me.instance_id, record.incarnation)
            me.incarnation = None
            context.coordinator.drop_all()
            context.on_exit(ExitCode.SUPERSEDED)
            return
        self._fence(f"Redis has incarnation {incarnation} as {record.state if record else 'unknown'}")

    async def ends_as_superseded(self, fenced: int) -> bool:
        """Ends this process when another one is registered since its incarnation `fenced`: it must not be pushed aside.

        Waits until Redis answers; true when it ends.
        """
        context = self._context
        while True:
            try:
                record = await context.store.instance(context.me.instance_id)
            except AutanError as error:
                logger.warning("incarnation %d is fenced, and Redis does not say who came after it: %s", fenced, error)
                await asyncio.sleep(context.timing.heartbeat_s)
                continue
            if record is None or record.incarnation <= fenced:
                return False
            logger.error("%s runs as incarnation %d elsewhere", context.me.instance_id, record.incarnation)
            context.on_exit(ExitCode.SUPERSEDED)
            return True

    def _renewed(self, sent_s: float) -> None:
        timing = self._context.timing
        self._renewed_s = sent_s
        if self._pause is not None:
            self._pause.cancel()
        loop = asyncio.get_running_loop()
        quiet_at = loop.time() + sent_s + timing.lease_s - timing.heartbeat_s - time.monotonic()
        self._pause = loop.call_at(quiet_at, self._fall_silent)
        self._context.outbox.resume()

    def _fall_silent(self) -> None:
        logger.warning("no renewal for %.1f s: nothing is emitted until Redis answers", self.silent_s)
        self._context.outbox.pause()

    def _check_fence(self) -> None:
        timing = self._context.timing
        if self._context.me.incarnation is not None and self.silent_s > timing.lease_s + timing.kv_lease_s:
            self._fence(f"no renewal for {self.silent_s:.1f} s")

    def _fence(self, why: str) -> None:
        context, me = self._context, self._context.me
        number = me.number
        logger.error("%s incarnation %d is fenced: %s", me.instance_id, number, why)
        me.incarnation = None
        me.lifecycle.move(InstanceState.LOST)
        context.outbox.pause()
        context.coordinator.drop_all()
        context.on_fenced(number)

    def _is_stalled(self) -> bool:
        context = self._context
        stalled_s, limit_s = context.engine.stalled_s(), context.timing.progress_timeout_s
        if stalled_s <= limit_s:
            self._told_stalled = False
            return False
        if not self._told_stalled:
            self._told_stalled = True
            logger.error("the engine has made no progress for %.1f s: nothing is renewed", stalled_s)
        if stalled_s > _STALLED_EXIT_FACTOR * limit_s:
            context.on_exit(ExitCode.ENGINE_LOST)
        return True

    def _drop_stuck(self) -> None:
        """What an engine without anything to run does not hold any more is never renewed."""
        context = self._context
        stats = context.engine.engine.stats()
        if context.engine.stalled_s() or stats.waiting or stats.running:
            return
        for assignment in context.assignments.stuck(time.monotonic(), context.timing.progress_timeout_s):
            context.coordinator.give_up(assignment, EngineFailure("the engine does not have the sequence"))

    def _follow(self, want_drain: bool) -> None:
        me = self._context.me
        if want_drain and me.state is InstanceState.READY:
            me.lifecycle.move(InstanceState.DRAINING)
            self.beat_soon()
        elif not want_drain and me.state is InstanceState.DRAINING and not self._context.stopping():
            me.lifecycle.move(InstanceState.READY)
            self.beat_soon()
