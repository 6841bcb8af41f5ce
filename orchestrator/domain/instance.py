"""The life of an instance, and an instance as the core sees it.

    STARTING --ready--> READY --drain--> DRAINING --stop--> STOPPED
       |                  |  <--undrain--   |
       +------lose--------+-----lose--------+--> LOST

LOST and STOPPED are final for one incarnation: a process that comes back registers, which is a new incarnation in STARTING.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from orchestrator.domain.ids import Incarnation, InstanceId
from orchestrator.domain.lifecycle import IllegalMove


class Role(StrEnum):
    """What an instance serves."""

    PREFILL = "prefill"
    DECODE = "decode"
    COMBINED = "combined"


PREFILL_ROLES = frozenset({Role.PREFILL, Role.COMBINED})
DECODE_ROLES = frozenset({Role.DECODE, Role.COMBINED})


class InstanceState(StrEnum):
    """The state as Redis keeps it."""

    STARTING = "STARTING"  # registered, loads the model
    READY = "READY"
    DRAINING = "DRAINING"  # finishes what it holds, takes nothing new
    LOST = "LOST"  # missed its heartbeats; what it held is requeued
    STOPPED = "STOPPED"  # left in good order


class InstanceMove(StrEnum):
    """What can happen to an instance."""

    READY = "ready"
    DRAIN = "drain"
    UNDRAIN = "undrain"
    STOP = "stop"
    LOSE = "lose"
    REGISTER = "register"


ALIVE_STATES = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.DRAINING})
GONE_STATES = frozenset(InstanceState) - ALIVE_STATES


def _table() -> dict[tuple[InstanceState, InstanceMove], InstanceState]:
    table = {
        (InstanceState.STARTING, InstanceMove.READY): InstanceState.READY,
        (InstanceState.STARTING, InstanceMove.DRAIN): InstanceState.DRAINING,
        (InstanceState.READY, InstanceMove.DRAIN): InstanceState.DRAINING,
        (InstanceState.DRAINING, InstanceMove.UNDRAIN): InstanceState.READY,
    }
    for state in ALIVE_STATES:
        table[state, InstanceMove.STOP] = InstanceState.STOPPED
        table[state, InstanceMove.LOSE] = InstanceState.LOST
    for state in InstanceState:
        table[state, InstanceMove.REGISTER] = InstanceState.STARTING
    return table


INSTANCE_MOVES: Mapping[tuple[InstanceState, InstanceMove], InstanceState] = MappingProxyType(_table())


def next_instance_state(state: InstanceState, move: InstanceMove) -> InstanceState:
    """The state after the move. Raises IllegalMove when the table has none."""
    try:
        return INSTANCE_MOVES[state, move]
    except KeyError:
        raise IllegalMove(f"an instance that is {state} cannot {move}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an instance said of itself when it registered, as far as decisions need it."""

    model: str
    fingerprint: str  # equal strings: KV may be handed over between the two
    block_tokens: int
    total_blocks: int
    context_tokens: int
    max_batch_tokens: int  # token budget of one engine step
    max_running: int  # sequences in one engine step
    block_bytes: int = 0  # KV bytes of one block over all layers
    weights_digest: str = ""  # the names of cached blocks depend on it


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """One instance at the moment of one view. The counters are those of the Redis library."""

    instance_id: InstanceId
    role: Role
    address: str
    incarnation: Incarnation
    state: InstanceState
    beat_ms: int  # Redis TIME of the last sign of life
    want_drain: bool
    prefill_requests: int  # assigned for prefill and not handed over yet
    prefill_tokens: int  # their prompt tokens
    prefill_blocks: int
    decode_requests: int  # assigned for decode, whether or not their KV is here yet
    decode_blocks: int
    capabilities: Capabilities | None  # None until the card is known
    moves_in: int = 0  # moves of running requests that are open
    moves_out: int = 0
    preemptions: int = 0  # since this incarnation started, as its last heartbeat has it
    prefill_tokens_per_s: float = 0.0  # as its last heartbeat has it; 0: it has computed no prompt yet

    @property
    def takes_work(self) -> bool:
        """True when new requests may be assigned: READY, not asked to drain, and its card is known."""
        return self.state is InstanceState.READY and not self.want_drain and self.capabilities is not None

    @property
    def reserved_blocks(self) -> int:
        """KV blocks promised to requests, in both roles."""
        return self.prefill_blocks + self.decode_blocks
