"""Carries the core's decisions out: one function for each effect that has an answer, the answer as an event."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from orchestrator.control import effects as do
from orchestrator.control import events as on
from orchestrator.control.effects import Effect
from orchestrator.control.events import Event
from orchestrator.domain.ids import Epoch, InstanceId, LeaderEpoch, RequestId
from orchestrator.domain.request import RequestState
from orchestrator.policy.migration import RunningRequest
from orchestrator.runtime.capabilities import Sign, SignMove, move_grant, unsigned, unsigned_move
from orchestrator.store.client import Store
from orchestrator.store.replies import Migration, Placement
from orchestrator.store.views import cluster_view
from protos.contract.errors import CapacityError, NotLeader, UnavailableError
from protos.contract.redis_names import Code

logger = logging.getLogger(__name__)


async def carry_out(
    effect: Effect,
    store: Store,
    candidate_id: str,
    sign: Sign = unsigned,
    sign_move: SignMove = unsigned_move,
    sign_prefix: Sign = unsigned,
) -> Event:
    """Does what the effect says, once, and returns its outcome; a store that does not answer is the outcome StoreLost.

    `sign` makes the capability of each hand-off that is assigned, `sign_prefix` that of each push of cached blocks before it,
    `sign_move` that of each move.

    Raises TypeError for an effect that has no answer or is none, and lets the library's refusals (InternalError) and
    wrong credentials (ConfigError) through: neither goes away by trying again.
    """
    handler = _HANDLERS.get(type(effect))
    try:
        if isinstance(effect, do.Assign):
            return await _assign(effect, store, candidate_id, sign, sign_prefix)
        if isinstance(effect, do.Migrate):
            return await _migrate(effect, store, candidate_id, sign_move)
        if handler is None:
            raise TypeError(f"not an effect with an answer: {effect!r}")
        return await handler(effect, store, candidate_id)
    except (UnavailableError, CapacityError) as error:
        return on.StoreLost(str(error))


async def _lead(effect: do.Lead, store: Store, candidate_id: str) -> Event:
    reply = await store.lead(candidate_id, effect.ttl_ms, effect.epoch)
    epoch = LeaderEpoch(reply.epoch)
    if not reply.leads:
        return on.LeadershipDenied(effect.number, epoch, reply.now_ms)
    if epoch == effect.epoch:
        return on.LeadershipKept(effect.number, epoch, reply.now_ms)
    return on.LeadershipGained(effect.number, epoch, reply.now_ms)


async def _read_view(effect: do.ReadView, store: Store, _candidate_id: str) -> Event:
    return on.ViewRead(effect.number, cluster_view(await store.view(effect.queue_limit)))


def _placement(item: do.Assignment, sign: Sign, sign_prefix: Sign) -> Placement:
    placement = Placement(
        item.request_id,
        item.expected_epoch,
        item.prefill,
        item.prefill_incarnation,
        item.decode,
        item.decode_incarnation,
        item.prefill_blocks,
        item.decode_blocks,
        sign(item),
    )
    source = item.prefix
    if source is None:
        return placement
    return replace(
        placement,
        s_inst=source.instance_id,
        s_inc=source.incarnation,
        s_blocks=source.blocks,
        s_wait_ms=source.wait_ms,
        s_capability=sign_prefix(item),
    )


async def _assign(effect: do.Assign, store: Store, candidate_id: str, sign: Sign, sign_prefix: Sign) -> Event:
    placements = [_placement(item, sign, sign_prefix) for item in effect.items]
    try:
        outcomes = await store.assign(candidate_id, effect.epoch, effect.lease_ms, placements)
    except NotLeader:
        return on.LeadershipLost(effect.epoch)
    answers = zip(effect.items, outcomes, strict=True)
    return on.AssignReplied(
        effect.number,
        tuple(on.AssignOutcome(item.request_id, outcome.code, Epoch(outcome.epoch)) for item, outcome in answers),
    )


async def _read_running(effect: do.ReadRunning, store: Store, _candidate_id: str) -> Event:
    found = [one for name in effect.instances for one in (await store.requests_at(name)).requests if one.d == name]
    return on.RunningRead(
        effect.number,
        tuple(
            RunningRequest(
                RequestId(one.request_id),
                Epoch(one.epoch),
                InstanceId(one.d),
                one.prompt_tokens + one.n,
                left_tokens=one.max_tokens - one.n,
                blocks=one.d_blocks,
                moves=one.moves,
                is_moving=bool(one.move_target),
                next_epoch=Epoch(one.next_epoch),
                most_tokens=one.prompt_tokens + one.max_tokens,
                deadline_ms=one.deadline_ms,
            )
            for one in found
            if one.state == "DECODING"
        ),
    )


async def _migrate(effect: do.Migrate, store: Store, candidate_id: str, sign_move: SignMove) -> Event:
    wanted = [
        Migration(
            item.request_id,
            item.expected_epoch,
            item.target,
            item.target_incarnation,
            item.blocks,
            item.move_epoch,
            sign_move(move_grant(item)),
            item.why,
            item.note,
        )
        for item in effect.items
    ]
    try:
        outcomes = await store.migrate(
            wanted, max_migrations=effect.max_migrations, leader_id=candidate_id, leader_epoch=effect.epoch
        )
    except NotLeader:
        return on.LeadershipLost(effect.epoch)
    for item, outcome in zip(effect.items, outcomes, strict=True):
        if outcome.code is Code.OK:
            where = f"from {item.source} to {item.target}"
            logger.info(
                "request %s moves %s under epoch %d: %s, %s", item.request_id, where, outcome.epoch, item.why, item.note
            )
    answers = zip(effect.items, outcomes, strict=True)
    return on.MigrateReplied(
        effect.number,
        tuple(on.AssignOutcome(item.request_id, outcome.code, Epoch(outcome.epoch)) for item, outcome in answers),
    )


async def _reap(effect: do.Reap, store: Store, candidate_id: str) -> Event:
    try:
        reply = await store.reap(
            candidate_id,
            effect.epoch,
            limit=effect.limit,
            max_attempts=effect.max_attempts,
            lost_ms=effect.lost_ms,
            retain_ms=effect.retain_ms,
        )
    except NotLeader:
        return on.LeadershipLost(effect.epoch)
    return on.Reaped(
        reply.now_ms,
        tuple(on.Ended(RequestId(ended.request_id), RequestState(ended.state)) for ended in reply.requests),
        tuple(InstanceId(instance) for instance in reply.lost),
    )


_HANDLERS: dict[type[Effect], Callable[[Any, Store, str], Awaitable[Event]]] = {
    do.Lead: _lead,
    do.ReadView: _read_view,
    do.ReadRunning: _read_running,
    do.Reap: _reap,
}
