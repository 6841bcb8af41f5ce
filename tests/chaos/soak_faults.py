"""The faults of a soak: each proves that it took effect, and returns when its victim is back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.client import AsyncClient
from orchestrator.runtime.launcher import RankState
from orchestrator.runtime.restarts import RestartRules
from protos.contract.errors import AutanError
from protos.wire import common
from tests.support.cluster import pid_of
from tests.support.processes import process_state
from tests.support.worker_world import until

BACK_WITHIN_S = 1.5 * RestartRules().cool_down_s + 30.0  # after the longest pause before a start


class Fault(StrEnum):
    """What happens."""

    KILL = "kill"
    SHORT_STOP = "short_stop"  # shorter than the lease
    LONG_STOP = "long_stop"  # longer than the lease: what it holds goes elsewhere
    FENCED_STOP = "fenced_stop"  # longer than lease and KV lease: it fences itself when it goes on
    STORE_KILL = "store_kill"
    STORE_STOP = "store_stop"  # Redis is there and does not answer
    HANG = "hang"  # the orchestrator does nothing for longer than its leases
    MIGRATE = "migrate"  # an operator moves a running request
    DRAIN = "drain"  # an operator drains an instance and takes it back


WORKER_WEIGHTS = {Fault.KILL: 50, Fault.SHORT_STOP: 15, Fault.LONG_STOP: 25, Fault.FENCED_STOP: 10}
STOP_WEIGHTS = {Fault.SHORT_STOP: 60, Fault.LONG_STOP: 40}
OPERATOR_WEIGHTS = {Fault.MIGRATE: 80, Fault.DRAIN: 20}
CENTRAL_WEIGHTS = {Fault.STORE_KILL: 40, Fault.STORE_STOP: 40, Fault.HANG: 20}
DISRUPTIVE = {Fault.KILL, Fault.LONG_STOP, Fault.FENCED_STOP, Fault.STORE_STOP, Fault.STORE_KILL}
STORE_FAULTS = {Fault.STORE_KILL, Fault.STORE_STOP}


@dataclass(slots=True)
class Struck:
    """One fault that happened."""

    fault: Fault
    victim: str
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float = float("inf")


def hang(seconds: float) -> None:
    """Holds the whole event loop, and with it the orchestrator and the clients."""
    time.sleep(seconds)


class Faults:
    """Strikes one victim after the other, by a random sequence of its own."""

    def __init__(
        self,
        cluster: LocalCluster,
        client: AsyncClient,
        rng: random.Random,
        weights: dict[Fault, int],
        victims: list[str],
        pause_s: tuple[float, float],
        struck: list[Struck],
    ) -> None:
        """`struck` is where all sequences of a run note what they did."""
        self._cluster = cluster
        self._client = client
        self._rng = rng
        self._weights = weights
        self._victims = victims
        self._pause_s = pause_s
        self._struck = struck

    async def run(self, until_s: float) -> None:
        """Strikes until the time, in monotonic seconds."""
        while True:
            fault = self._rng.choices(list(self._weights), list(self._weights.values()))[0]
            victim = self._rng.choice(self._victims)
            share, pause_s = self._rng.random(), self._rng.uniform(*self._pause_s)
            if time.monotonic() + pause_s >= until_s:
                return
            await asyncio.sleep(pause_s)
            await self.strike(fault, victim, share)

    async def strike(self, fault: Fault, victim: str, share: float) -> None:
        """One fault; `share` in [0, 1) sets how long a stop lasts. Returns when the victim serves again."""
        timing = self._cluster.config.timing
        struck = Struck(fault, victim)
        if fault is Fault.MIGRATE:
            struck.victim = await self._migrate(share)
            if not struck.victim:
                return  # nothing that could be moved runs
        self._struck.append(struck)
        match fault:
            case Fault.DRAIN:
                await self._drain(victim, 1.0 + 3.0 * share)
            case Fault.KILL:
                await self._kill(victim)
            case Fault.STORE_KILL:
                await self._kill_store()
            case Fault.STORE_STOP:
                await self._stop_store(self._cluster.config.store.timeout_s * (0.5 + 3.0 * share))
            case Fault.HANG:
                hang(max(timing.leader_lease_s, timing.lease_s) * (1.1 + 0.5 * share))
            case Fault.SHORT_STOP:
                await self._stop(victim, timing.lease_s * (0.1 + 0.4 * share))
            case Fault.LONG_STOP:
                await self._stop(victim, timing.lease_s * (1.3 + 0.7 * share))
            case Fault.FENCED_STOP:
                await self._stop(victim, timing.lease_s + timing.kv_lease_s * (1.1 + 0.5 * share))
        struck.ended_s = time.monotonic()

    async def _kill(self, victim: str) -> None:
        async def runs() -> bool:
            return (await self._cluster.launcher.alive())[victim][0].state is RankState.RUNNING

        await until(runs, f"{victim} runs", BACK_WITHIN_S)
        before = (await self._cluster.launcher.alive())[victim][0]
        os.kill(before.pid, signal.SIGKILL)
        await until(lambda: process_state(before.pid) == "", f"{victim} is dead", 5.0)

        async def runs_again() -> bool:
            rank = (await self._cluster.launcher.alive())[victim][0]
            return rank.state is RankState.RUNNING and rank.pid != before.pid and rank.restarts > before.restarts

        await until(runs_again, f"{victim} is started again", BACK_WITHIN_S)

    async def _migrate(self, share: float) -> str:
        """The request whose move has begun: its epoch is that of the move. Empty when none could be moved."""
        targets = sorted(pool.name for pool in self._cluster.config.pools if pool.role != "prefill")
        try:
            running = [one for one in await self._client.requests() if one.state == "DECODING"]
            names = [name for name in await self._cluster.launcher.alive() if name.rsplit("-", 1)[0] in targets]
            if not running:
                return ""
            one = running[int(share * len(running))]
            others = [name for name in names if name != one.decode_instance]
            epoch = await self._client.migrate(one.request_id, others[int(share * len(others))])
        except AutanError:
            return ""  # it ended, the target is away, or the store is: nothing has begun
        assert epoch > one.epoch, f"{one.request_id}: the move has epoch {epoch}, the request had {one.epoch}"
        return one.request_id

    async def _drain(self, victim: str, seconds: float) -> None:
        """Proof: the registry says DRAINING; the instance takes work again afterwards, under whatever incarnation."""
        drained = False

        async def is_on(on: bool, state: int) -> bool:
            try:
                await self._client.drain(victim, on)
                found = {one.instance_id: one.state for one in (await self._client.status()).instances}
            except AutanError:
                return False  # the store is away
            return found.get(victim) == state

        try:
            await until(lambda: is_on(True, common.INSTANCE_STATE_DRAINING), f"{victim} drains", BACK_WITHIN_S)
            drained = True
            await asyncio.sleep(seconds)
        finally:
            await until(lambda: is_on(False, common.INSTANCE_STATE_READY), f"{victim} takes work again", BACK_WITHIN_S)
        assert drained

    async def _stop(self, victim: str, seconds: float) -> None:
        await self._stop_process(await pid_of(self._cluster, victim), victim, seconds)

    async def _stop_process(self, pid: int, victim: str, seconds: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            await until(lambda: process_state(pid) == "T", f"{victim} stands", 5.0)
            await asyncio.sleep(seconds)
            assert process_state(pid) == "T", f"{victim} stood for {seconds} s"
        finally:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: process_state(pid) != "T", f"{victim} goes on", 5.0)

    async def _stop_store(self, seconds: float) -> None:
        store = self._cluster.embedded
        assert store is not None
        await until(lambda: store.server_pid != 0, "the store runs", BACK_WITHIN_S)
        await self._stop_process(store.server_pid, "the store", seconds)

    async def _kill_store(self) -> None:
        store = self._cluster.embedded
        assert store is not None
        await until(lambda: store.server_pid != 0, "the store runs", BACK_WITHIN_S)
        pid, starts = store.server_pid, store.starts
        os.kill(pid, signal.SIGKILL)
        await until(lambda: process_state(pid) == "", "the store is dead", 5.0)
        await until(lambda: store.starts > starts and store.server_pid not in (0, pid), "the store is back", BACK_WITHIN_S)
