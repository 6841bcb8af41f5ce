"""The lifecycle of an instance, as its own process sees it, and how the process ends.

    STARTING ──► READY ◄──► DRAINING ──► STOPPED
       ▲           │            │
       └── LOST ◄──┴────────────┘    fenced: everything is dropped, then it registers as the next incarnation

STARTING may be lost, drain and stop as well. STOPPED is the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum

from workers.kv_transfer.lifecycle import Lifecycle


class InstanceState(StrEnum):
    """Where one instance is."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    LOST = "LOST"
    STOPPED = "STOPPED"

    @property
    def wire(self) -> str:
        """The name of the same on the wire."""
        return f"INSTANCE_STATE_{self.value}"


INSTANCE_MOVES: Mapping[InstanceState, frozenset[InstanceState]] = {
    InstanceState.STARTING: frozenset({InstanceState.READY, InstanceState.DRAINING, InstanceState.LOST, InstanceState.STOPPED}),
    InstanceState.READY: frozenset({InstanceState.DRAINING, InstanceState.LOST, InstanceState.STOPPED}),
    InstanceState.DRAINING: frozenset({InstanceState.READY, InstanceState.LOST, InstanceState.STOPPED}),
    InstanceState.LOST: frozenset({InstanceState.STARTING, InstanceState.STOPPED}),
    InstanceState.STOPPED: frozenset(),
}


class ExitCode(IntEnum):
    """Why a worker process ended. Launchers restart after everything but STOPPED, BAD_SPEC and SUPERSEDED."""

    STOPPED = 0  # asked to
    FAILED = 1  # a bug; the log has it
    BAD_SPEC = 2  # the spec or the model cannot be used
    SUPERSEDED = 10  # a newer incarnation of the instance is registered
    GROUP_BROKEN = 11  # a rank of the group is gone
    ENGINE_LOST = 12  # the engine raised outside a request, or hangs
    ORPHANED = 13  # the parent is gone


BROKEN_CODES = frozenset({ExitCode.GROUP_BROKEN, ExitCode.ENGINE_LOST})


def instance_lifecycle() -> Lifecycle[InstanceState]:
    """An instance that is not registered yet."""
    return Lifecycle(INSTANCE_MOVES, InstanceState.STARTING)
