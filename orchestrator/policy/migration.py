"""Which running requests leave an instance, and where each goes. Pure: frozen values in, moves out; ties by id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from orchestrator.domain.ids import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.domain.instance import DECODE_ROLES, InstanceView


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """One request that decodes. `tokens`: prompt and output so far; `blocks`: reserved where it decodes."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    tokens: int
    left_tokens: int = 0  # that it may still produce
    blocks: int = 0
    moves: int = 0  # begun so far
    is_moving: bool = False
    fingerprint: str = ""  # of the instance
    incarnation: Incarnation | None = None  # of the instance
    next_epoch: Epoch | None = None  # that a move has
    most_tokens: int = 0  # prompt and output at its longest
    deadline_ms: int = 0  # on the clock of Redis


@dataclass(frozen=True, slots=True)
class Move:
    """One request and its target; `blocks` are what it fills there at least."""

    request_id: RequestId
    epoch: Epoch
    target: InstanceId
    incarnation: Incarnation
    blocks: int


def may_receive(source: InstanceView, target: InstanceView) -> bool:
    """True when running requests of `source` could go on at `target`: it decodes, takes work and serves the same thing."""
    mine, theirs = source.capabilities, target.capabilities
    if mine is None or theirs is None or target.instance_id == source.instance_id:
        return False
    return target.takes_work and target.role in DECODE_ROLES and mine.fingerprint == theirs.fingerprint


def plan_drain(source: InstanceView, instances: Sequence[InstanceView], running: Iterable[RunningRequest]) -> list[Move]:
    """Moves for the requests of `source`, smallest first, as far as others have the blocks and a free sequence for them.

    Each goes to the instance that has the smallest share of its blocks promised away by then.
    """
    targets = [target for target in instances if may_receive(source, target)]
    moves: list[Move] = []
    mine = (request for request in running if request.instance == source.instance_id)
    for request in sorted(mine, key=lambda request: (request.tokens, request.request_id)):
        found = _best(targets, request.tokens)
        if found is None:
            continue
        place, blocks = found
        target = targets[place]
        moves.append(Move(request.request_id, request.epoch, target.instance_id, target.incarnation, blocks))
        targets[place] = replace(
            target, decode_requests=target.decode_requests + 1, decode_blocks=target.decode_blocks + blocks
        )
    return moves


def _best(targets: Sequence[InstanceView], tokens: int) -> tuple[int, int] | None:
    """The place of the best target in the list, and the blocks that so many tokens fill there and one more."""
    best: tuple[float, str, int, int] | None = None
    for place, target in enumerate(targets):
        able = target.capabilities
        assert able is not None
        blocks = tokens // able.block_tokens + 2
        if target.reserved_blocks + blocks > able.total_blocks or target.decode_requests >= able.max_running:
            continue
        rank = (target.reserved_blocks / able.total_blocks, target.instance_id, place, blocks)
        best = rank if best is None else min(best, rank)
    return None if best is None else (best[2], best[3])
