"""What this worker says of itself, and how it reaches its peers: its row of `autan doctor`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from protos.contract.errors import AutanError, InvalidRequest
from protos.contract.redis_names import PROTOCOL_VERSION
from protos.rpc import error_of, worker_pb2_grpc
from protos.wire import audit, common, differing_fields, worker
from workers.service.clock import wall_clock_s
from workers.service.membership import Membership
from workers.service.store import WorkerStore
from workers.service.wire import Wire

_MAX_PEERS = 1024
_AT_ONCE = 16
_TIMEOUT_S = (0.1, 2.0, 30.0)  # least, when not said, most
_SHARED = Path("/dev/shm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def shared_memory_name() -> str:
    """Equal names: two processes see the same shared memory, under the same kernel and mount. Empty: there is none to use."""
    try:
        device, boot_id = _SHARED.stat().st_dev, _BOOT_ID.read_bytes()
    except OSError:
        return ""
    if not os.access(_SHARED, os.W_OK | os.X_OK):
        return ""
    return hashlib.blake2b(boot_id + device.to_bytes(8, "little"), digest_size=8).hexdigest()


def autan_version() -> str:
    """The installed version; `unknown` in a checkout that was never installed."""
    try:
        return package_version("autan")
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosisContext:
    """Who asks."""

    me: Membership
    fingerprint: common.Fingerprint
    store: WorkerStore
    wire: Wire


class Diagnosis:
    """Answers Worker.Diagnose."""

    def __init__(self, context: DiagnosisContext) -> None:
        self._context = context

    def about(self) -> audit.SelfReport:
        """What needs no question to anybody."""
        context = self._context
        return audit.SelfReport(
            instance_id=context.me.instance_id,
            incarnation=context.me.number,
            version=autan_version(),
            python=platform.python_version(),
            protocol_version=PROTOCOL_VERSION,
            fingerprint=context.fingerprint,
            wall_clock_s=wall_clock_s(),
            shared_memory=shared_memory_name(),
        )

    async def report(self, request: worker.WorkerDiagnoseRequest) -> audit.SelfReport:
        """Asks Redis, the ingress and every peer, side by side; nobody to ask: only about itself.

        Raises InvalidRequest for too many peers.
        """
        if len(request.peers) > _MAX_PEERS:
            raise InvalidRequest(f"peers: {len(request.peers)} are named, at most {_MAX_PEERS} are asked")
        least_s, usual_s, most_s = _TIMEOUT_S
        timeout_s = min(most_s, max(least_s, request.timeout_s)) if request.timeout_s > 0 else usual_s
        made = self.about()
        if not request.peers and not request.sink_address:
            return made  # a probe: measured by the caller, so answered at once
        turns = asyncio.Semaphore(_AT_ONCE)
        probes = [self._probe(peer, timeout_s, turns) for peer in request.peers]
        if request.sink_address:
            probes.append(self._reach(request.sink_address, timeout_s))
        store, found = await asyncio.gather(self._ask_store(), asyncio.gather(*probes))
        if store is not None:
            made.store_reachable = True
            made.store_rtt_s, made.store_offset_s = store
        made.peers.extend(found)
        return made

    async def _ask_store(self) -> tuple[float, float] | None:
        """Round trip and how far Redis TIME is ahead of this wall clock, seconds; None when Redis does not answer."""
        try:
            await self._context.store.time_s()  # the first call may have to connect
            sent_s, began_s = wall_clock_s(), time.monotonic()
            there_s = await self._context.store.time_s()
        except AutanError:
            return None
        rtt_s = time.monotonic() - began_s
        return rtt_s, there_s - (sent_s + rtt_s / 2)

    async def _probe(self, peer: worker.PeerAddress, timeout_s: float, turns: asyncio.Semaphore) -> audit.PeerProbe:
        probe = audit.PeerProbe(instance_id=peer.instance_id, address=peer.address)
        async with turns, self._context.wire.peers.open(peer.address) as channel:
            stub: Any = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
            request = worker.WorkerDiagnoseRequest(timeout_s=_TIMEOUT_S[0])
            try:
                await asyncio.wait_for(channel.channel_ready(), timeout_s)
                sent_s, began_s = wall_clock_s(), time.monotonic()
                reply: audit.SelfReport = await stub.Diagnose(request, timeout=timeout_s)
            except TimeoutError:
                probe.error = f"no connection within {timeout_s:g} s"
                return probe
            except grpc.RpcError as error:
                probe.error = error_of(error).message
                return probe
        probe.reachable = True
        probe.rtt_s = time.monotonic() - began_s
        probe.clock_offset_s = reply.wall_clock_s - (sent_s + probe.rtt_s / 2)
        probe.is_expected = (reply.instance_id, reply.incarnation) == (peer.instance_id, peer.incarnation)
        if not probe.is_expected:
            probe.error = f"{reply.instance_id} incarnation {reply.incarnation} answers there"
        probe.differing.extend(differing_fields(self._context.fingerprint, reply.fingerprint))
        own = shared_memory_name()
        probe.shared_memory = bool(own) and own == reply.shared_memory
        return probe

    async def _reach(self, address: str, timeout_s: float) -> audit.PeerProbe:
        """A connection to the ingress, which has nothing to ask."""
        probe = audit.PeerProbe(address=address, is_expected=True)
        async with self._context.wire.ingresses.open(address) as channel:
            began_s = time.monotonic()
            try:
                await asyncio.wait_for(channel.channel_ready(), timeout_s)
            except TimeoutError:
                probe.error = f"no connection within {timeout_s:g} s"
                return probe
        probe.reachable, probe.rtt_s = True, time.monotonic() - began_s
        return probe
