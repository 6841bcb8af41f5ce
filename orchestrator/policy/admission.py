"""Whether an instance can take a request: ever, and now.

All answers are monotonous: what refuses a request refuses every longer one, and a busier instance admits no more
than an idler one. The planner of a turn relies on that to stop asking early.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.domain.view import QueuedRequest
from orchestrator.policy.load import Load, prefill_blocks, whole_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """How much is bound to an instance in advance; everything beyond waits in Redis, where it can still go elsewhere."""

    window_steps: int = 4  # prefill tokens in flight on an instance, counted in token budgets of one engine step
    min_prefills: int = 2  # prefills in flight whatever their length: one computes, one is ready behind it


def could_prefill(request: QueuedRequest, load: Load) -> bool:
    """True when the idle instance could prefill the request."""
    capabilities = load.capabilities
    return (
        capabilities.model == request.model
        and request.prefill_tokens < capabilities.context_tokens
        and prefill_blocks(request, capabilities) <= capabilities.total_blocks
    )


def could_decode(request: QueuedRequest, load: Load) -> bool:
    """True when the idle instance could hold the request up to its last token."""
    capabilities = load.capabilities
    return (
        capabilities.model == request.model
        and request.prefill_tokens < capabilities.context_tokens
        and whole_blocks(request, capabilities) <= capabilities.total_blocks
    )


def has_prefill_room(request: QueuedRequest, load: Load, limits: AdmissionLimits) -> bool:
    """True when the token budget and the block budget of the instance admit one more prefill now."""
    capabilities = load.capabilities
    blocks = prefill_blocks(request, capabilities)
    return _has_token_room(request, load, limits) and load.reserved_blocks + blocks <= capabilities.total_blocks


def has_decode_room(request: QueuedRequest, load: Load) -> bool:
    """True when every token that the request may ever need has its block, and its sequence fits the step."""
    capabilities = load.capabilities
    return (
        load.decode_requests < capabilities.max_running
        and load.reserved_blocks + whole_blocks(request, capabilities) <= capabilities.total_blocks
    )


def has_local_room(request: QueuedRequest, load: Load, limits: AdmissionLimits) -> bool:
    """True when the instance can prefill and decode the request; its blocks are counted once."""
    return _has_token_room(request, load, limits) and has_decode_room(request, load)


def _has_token_room(request: QueuedRequest, load: Load, limits: AdmissionLimits) -> bool:
    window_tokens = limits.window_steps * load.capabilities.max_batch_tokens
    return load.prefill_requests < limits.min_prefills or load.prefill_tokens + request.prefill_tokens <= window_tokens
