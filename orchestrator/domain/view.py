"""What the core sees of the cluster at one moment: the reply of the library's view function as values."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.domain.ids import Epoch, InstanceId, RequestId
from orchestrator.domain.instance import InstanceView


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRequest:
    """One request in state QUEUED."""

    request_id: RequestId
    epoch: Epoch
    prompt_tokens: int
    max_tokens: int
    output_tokens: int  # accepted before it was requeued; they are prefilled with the prompt
    priority: int  # -1 batch, 0 normal, 1 high
    submitted_ms: int
    deadline_ms: int
    tenant: str
    model: str
    attempts: int
    cached: tuple[tuple[InstanceId, int], ...] = ()  # who has leading full blocks of its tokens, and how many; each once

    def cached_blocks(self, instance_id: InstanceId) -> int:
        """Leading full blocks that the instance has in its cache, as far as is known."""
        return next((blocks for name, blocks in self.cached if name == instance_id), 0)

    @property
    def prefill_tokens(self) -> int:
        """Tokens that a prefill instance computes at most."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Queue and instances in one atomic read. `queued` is the head of the queue (highest class first, then oldest first)."""

    now_ms: int  # Redis TIME
    queued_total: int
    queued: tuple[QueuedRequest, ...]
    instances: tuple[InstanceView, ...]
