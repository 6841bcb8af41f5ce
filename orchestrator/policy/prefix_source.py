"""Whether a request's first blocks shall come from the cache of another instance, and from which. Pure.

Moving blocks wins over computing them when it is predicted to take less time by a margin: the prediction knows neither who
else uses the link nor how the prompt would have shared the engine's steps. A wrong prediction costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.domain.ids import Incarnation, InstanceId
from orchestrator.domain.instance import InstanceState, InstanceView
from orchestrator.domain.view import QueuedRequest
from orchestrator.policy.load import Load

_LENDING = frozenset({InstanceState.READY, InstanceState.DRAINING})
_WAIT_FACTOR = 4.0  # of the predicted time, before the prompt is computed from what is there
_LEAST_WAIT_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixRules:
    """What the operator decides. Speeds are those to count on: a slower link or a faster engine makes moving rarer."""

    enabled: bool = True
    min_blocks: int = 4  # fewer are never worth it
    link_bytes_per_s: float = 400e6
    overhead_s: float = 0.01  # two inboxes, one Open, one commit
    prefill_tokens_per_s: float = 20_000.0  # of an instance that has not reported its own
    margin: float = 1.5
    deadline_share: float = 0.25  # of what is left of the request's time: moving may take no more


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSource:
    """An instance that has the first `blocks` full blocks; the prefill waits `wait_ms` for them at most."""

    instance_id: InstanceId
    incarnation: Incarnation
    blocks: int
    wait_ms: int


def choose_source(
    request: QueuedRequest, target: Load, instances: Iterable[InstanceView], rules: PrefixRules, now_ms: int
) -> PrefixSource | None:
    """The instance to move missing blocks from, when that is predicted to pay; of equal ones the idler."""
    if not rules.enabled or not request.cached:
        return None
    capabilities = target.capabilities
    here = request.cached_blocks(target.instance.instance_id)
    # One token is always computed: its logits give the next one.
    useful = (request.prefill_tokens - 1) // capabilities.block_tokens
    holders = [
        (min(request.cached_blocks(one.instance_id), useful), one)
        for one in instances
        if one.instance_id != target.instance.instance_id and _may_lend(one, capabilities.fingerprint)
    ]
    if not holders:
        return None
    blocks, source = min(holders, key=lambda found: (-found[0], found[1].prefill_tokens, found[1].instance_id))
    missing = blocks - here
    if missing < max(1, rules.min_blocks):
        return None
    move_s = predicted_move_s(missing * capabilities.block_bytes, rules)
    compute_s = missing * capabilities.block_tokens / (target.instance.prefill_tokens_per_s or rules.prefill_tokens_per_s)
    left_s = max(0.0, (request.deadline_ms - now_ms) / 1000)
    if move_s * rules.margin > compute_s or move_s > left_s * rules.deadline_share:
        return None
    wait_s = min(max(_LEAST_WAIT_S, _WAIT_FACTOR * move_s), left_s * rules.deadline_share)
    return PrefixSource(
        instance_id=source.instance_id, incarnation=source.incarnation, blocks=blocks, wait_ms=max(1, int(wait_s * 1000))
    )


def predicted_move_s(num_bytes: int, rules: PrefixRules) -> float:
    """From the assignment to the last block in the cache of the target."""
    return rules.overhead_s + num_bytes / rules.link_bytes_per_s


def _may_lend(instance: InstanceView, fingerprint: str) -> bool:
    return instance.state in _LENDING and instance.capabilities is not None and instance.capabilities.fingerprint == fingerprint
