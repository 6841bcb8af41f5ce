"""Drives the core: events in, effects out, time, hints.

    outcomes of effects --+
    hints of the store ---+--> core.handle --> effects --> tasks --> outcomes
    the clock ------------+

The core is called from one task only. Effects run side by side, each answers with one event.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from configs.schema.cluster import ClusterConfig
from orchestrator.control import effects as do
from orchestrator.control import events as on
from orchestrator.control.core import CoreStatus, OrchestratorCore
from orchestrator.control.effects import Effect
from orchestrator.control.events import Event
from orchestrator.control.settings import CoreSettings
from orchestrator.control.story import Recorder, story
from orchestrator.domain.clock import Clock, SystemClock
from orchestrator.policy.placement import PlacementRules
from orchestrator.policy.prefix_source import PrefixRules
from orchestrator.policy.rebalance import RebalanceRules
from orchestrator.runtime.capabilities import Sign, SignMove, unsigned, unsigned_move
from orchestrator.runtime.effects import carry_out
from orchestrator.runtime.prefix_facts import PrefixFacts
from orchestrator.store.client import Store
from protos.contract.redis_names import core_channel

logger = logging.getLogger(__name__)

_MAX_EVENTS_PER_TURN = 64
_MAX_CALLS = 16  # to the store at once; fewer than its client has connections


def settings_of(config: ClusterConfig) -> CoreSettings:
    """What the cluster file says about deciding."""
    timing, scheduling = config.timing, config.scheduling
    return CoreSettings(
        rules=PlacementRules(
            local_prefill=scheduling.local_prefill_without_prefill_pool,
            prefix=PrefixRules(**scheduling.prefix_fetch.model_dump()),
        ),
        rebalance=RebalanceRules(**scheduling.rebalance.model_dump(), max_migrations=scheduling.max_migrations),
        leader_lease_s=timing.leader_lease_s,
        lease_s=timing.lease_s,
        lost_s=timing.lease_s,
        suspect_s=3 * timing.heartbeat_s,
        retain_s=timing.retain_s,
        max_attempts=scheduling.max_attempts,
        batch_requests=scheduling.batch_requests,
    )


class CoreLoop:
    """One candidate for the leadership of one cluster. `run` it as a task; cancel it to stop.

    `candidate_id` is unique per process: a candidate that comes back under an old id fences the one before.
    """

    def __init__(
        self,
        store: Store,
        settings: CoreSettings,
        candidate_id: str,
        clock: Clock | None = None,
        recorder: Recorder | None = None,
        sign: Sign = unsigned,
        sign_move: SignMove = unsigned_move,
        sign_prefix: Sign = unsigned,
        prefixes: PrefixFacts | None = None,
    ) -> None:
        self._store = store
        self._candidate_id = candidate_id
        self._sign = sign
        self._sign_move = sign_move
        self._sign_prefix = sign_prefix
        self._prefixes = prefixes
        self._clock = clock or SystemClock()
        self._core = OrchestratorCore(settings, self._clock.now_s())
        self._recorder = recorder or Recorder()
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._is_hinted = False
        self._is_store_away = False
        self._wake_at_s = self._clock.now_s()
        self._calls = asyncio.Semaphore(_MAX_CALLS)

    @property
    def status(self) -> CoreStatus:
        """Where the core stands."""
        return self._core.status

    @property
    def recorder(self) -> Recorder:
        """The log of events and effects."""
        return self._recorder

    def story(self, subject: str) -> list[str]:
        """What the core knows of one request or instance, as far as its log reaches back."""
        return story(self._recorder, subject)

    async def run(self) -> None:
        """Decides until it is cancelled. Loss of the store is waited out.

        Raises an ExceptionGroup for what no waiting helps against: a library of another version, wrong credentials, a bug.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(), name="core-hints")
                while True:
                    for event in await self._next_events():
                        self._turn(event, tasks)
        finally:
            if self._prefixes is not None:
                await self._prefixes.close()

    async def _next_events(self) -> list[Event]:
        """What happened since, at most one turn's worth; waits for something to happen or for the time that the core set."""
        if not self._events and not self._is_hinted:
            self._news.clear()
            try:
                async with asyncio.timeout(max(0.0, self._wake_at_s - self._clock.now_s())):
                    await self._news.wait()
            except TimeoutError:
                pass  # the time has come
        else:
            await asyncio.sleep(0)
        events = [self._events.popleft() for _ in range(min(len(self._events), _MAX_EVENTS_PER_TURN))]
        if self._is_hinted:
            self._is_hinted = False
            events.append(on.Hinted())
        if self._clock.now_s() >= self._wake_at_s:
            events.append(on.Ticked())
        return events

    def _turn(self, event: Event, tasks: asyncio.TaskGroup) -> None:
        now_s = self._clock.now_s()
        effects = self._core.handle(event, now_s)
        self._recorder.record(event, effects, now_s)
        _log(event)
        for effect in effects:
            if isinstance(effect, do.WakeAt):
                self._wake_at_s = effect.at_s
            elif not isinstance(effect, do.Explain):
                tasks.create_task(self._carry_out(effect), name=type(effect).__name__)

    async def _carry_out(self, effect: Effect) -> None:
        async with self._calls:
            event = await carry_out(effect, self._store, self._candidate_id, self._sign, self._sign_move, self._sign_prefix)
            if isinstance(event, on.ViewRead) and self._prefixes is not None:
                event = on.ViewRead(event.number, await self._prefixes.complete(event.view))
        is_away = isinstance(event, on.StoreLost)
        if self._is_store_away and not is_away:
            self._events.append(on.StoreBack())
        self._is_store_away = is_away
        self._events.append(event)
        self._news.set()

    async def _listen(self) -> None:
        async for _ in self._store.hints(core_channel(self._store.cluster)):
            self._is_hinted = True
            self._news.set()


def _log(event: Event) -> None:
    match event:
        case on.LeadershipGained():
            logger.info("leading under epoch %d", event.epoch)
        case on.LeadershipLost():
            logger.warning("another core leads since; epoch %d is over", event.epoch)
        case on.StoreLost():
            logger.warning("the store is away: %s", event.reason)
        case on.StoreBack():
            logger.info("the store is back")
        case on.Reaped():
            for ended in event.requests:
                logger.info("request %s was overdue: now %s", ended.request_id, ended.state)
            for instance in event.lost:
                logger.warning("instance %s is LOST", instance)
        case _:
            pass
