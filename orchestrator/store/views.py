"""The store's records as the values that the core decides on."""

from __future__ import annotations

import logging
from functools import lru_cache
from math import isfinite

from google.protobuf.message import DecodeError

from orchestrator.domain.ids import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.domain.instance import Capabilities, InstanceState, InstanceView, Role
from orchestrator.domain.view import ClusterView, QueuedRequest
from orchestrator.store.replies import InstanceRecord, QueuedRecord, View
from protos import wire

logger = logging.getLogger(__name__)


def cluster_view(view: View) -> ClusterView:
    """One view. An instance of a role or state that does not exist here is left out: it gets no work."""
    return ClusterView(
        now_ms=view.now_ms,
        queued_total=view.queued_total,
        queued=tuple(_queued(record) for record in view.queued),
        instances=tuple(instance for record in view.instances if (instance := _instance(record)) is not None),
    )


def _queued(record: QueuedRecord) -> QueuedRequest:
    return QueuedRequest(
        request_id=RequestId(record.request_id),
        epoch=Epoch(record.epoch),
        prompt_tokens=record.prompt_tokens,
        max_tokens=record.max_tokens,
        output_tokens=record.n,
        priority=record.prio,
        submitted_ms=record.submitted_ms,
        deadline_ms=record.deadline_ms,
        tenant=record.tenant,
        model=record.model,
        attempts=record.attempts,
    )


def _instance(record: InstanceRecord) -> InstanceView | None:
    try:
        role, state = Role(record.role), InstanceState(record.state)
    except ValueError:
        logger.warning("instance %s is left out: role %r, state %r", record.instance_id, record.role, record.state)
        return None
    return InstanceView(
        instance_id=InstanceId(record.instance_id),
        role=role,
        address=record.addr,
        incarnation=Incarnation(record.incarnation),
        state=state,
        beat_ms=record.beat_ms,
        want_drain=record.want_drain,
        prefill_requests=record.p_requests,
        prefill_tokens=record.p_tokens,
        prefill_blocks=record.p_blocks,
        decode_requests=record.d_requests,
        decode_blocks=record.d_blocks,
        capabilities=capabilities(record.card),
        moves_in=max(0, record.m_in),
        moves_out=max(0, record.m_out),
        preemptions=_reported(record.stats)[0],
        prefill_tokens_per_s=_reported(record.stats)[1],
    )


@lru_cache(maxsize=4096)
def _reported(stats: bytes) -> tuple[int, float]:
    """Preemptions and prefill speed; zeros for bytes that are no statistics."""
    try:
        parsed = wire.common.InstanceStats.FromString(stats)
    except DecodeError:
        return 0, 0.0
    speed = parsed.prefill_tokens_per_s
    return int(parsed.preemptions), speed if isfinite(speed) and speed > 0 else 0.0


@lru_cache(maxsize=4096)
def capabilities(card: bytes) -> Capabilities | None:
    """What a registered card says; None for a card that is no card, or that claims nothing to work with."""
    parsed = wire.common.InstanceCard()
    try:
        parsed.ParseFromString(card)
    except DecodeError:
        return None
    print_of = parsed.fingerprint
    if min(print_of.block_tokens, parsed.total_blocks, parsed.context_tokens, parsed.max_batch_tokens, parsed.max_running) < 1:
        return None
    return Capabilities(
        model=print_of.model,
        fingerprint=wire.fingerprint_key(print_of),
        block_tokens=print_of.block_tokens,
        total_blocks=parsed.total_blocks,
        context_tokens=parsed.context_tokens,
        max_batch_tokens=parsed.max_batch_tokens,
        max_running=parsed.max_running,
        block_bytes=print_of.block_tokens * print_of.num_layers * print_of.row_bytes,
        weights_digest=print_of.weights_digest,
    )
