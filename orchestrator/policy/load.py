"""What is promised to an instance at the moment of a decision: its counters in the view and the dispatches since."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.domain.instance import Capabilities, InstanceView, Role
from orchestrator.domain.view import QueuedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One instance that may take work."""

    instance: InstanceView
    capabilities: Capabilities
    prefill_requests: int
    prefill_tokens: int
    decode_requests: int
    reserved_blocks: int

    @property
    def role(self) -> Role:
        """What the instance serves."""
        return self.instance.role

    def with_prefill(self, tokens: int, blocks: int) -> Load:
        """The load after one more request was promised to it for prefill."""
        return Load(
            instance=self.instance,
            capabilities=self.capabilities,
            prefill_requests=self.prefill_requests + 1,
            prefill_tokens=self.prefill_tokens + tokens,
            decode_requests=self.decode_requests,
            reserved_blocks=self.reserved_blocks + blocks,
        )

    def with_decode(self, blocks: int) -> Load:
        """The load after one more request was promised to it for decode."""
        return Load(
            instance=self.instance,
            capabilities=self.capabilities,
            prefill_requests=self.prefill_requests,
            prefill_tokens=self.prefill_tokens,
            decode_requests=self.decode_requests + 1,
            reserved_blocks=self.reserved_blocks + blocks,
        )

    def without_decode(self, blocks: int) -> Load:
        """The load after one request left it."""
        return Load(
            instance=self.instance,
            capabilities=self.capabilities,
            prefill_requests=self.prefill_requests,
            prefill_tokens=self.prefill_tokens,
            decode_requests=max(0, self.decode_requests - 1),
            reserved_blocks=max(0, self.reserved_blocks - blocks),
        )


def load_of(instance: InstanceView) -> Load:
    """The load that the view shows. Raises AssertionError for an instance whose card is not known."""
    assert instance.capabilities is not None, f"{instance.instance_id} has no card"
    return Load(
        instance=instance,
        capabilities=instance.capabilities,
        prefill_requests=instance.prefill_requests,
        prefill_tokens=instance.prefill_tokens,
        decode_requests=instance.decode_requests,
        reserved_blocks=instance.reserved_blocks,
    )


def prefill_blocks(request: QueuedRequest, capabilities: Capabilities) -> int:
    """KV blocks that the prompt fills."""
    return -(-request.prefill_tokens // capabilities.block_tokens)


def whole_blocks(request: QueuedRequest, capabilities: Capabilities) -> int:
    """KV blocks of the request at its longest: prompt and max_tokens, at most the context."""
    tokens = min(request.prompt_tokens + request.max_tokens, capabilities.context_tokens)
    return -(-tokens // capabilities.block_tokens)
