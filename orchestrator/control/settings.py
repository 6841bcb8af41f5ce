"""The numbers that the core decides with."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.policy.placement import PlacementRules
from orchestrator.policy.rebalance import RebalanceRules


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """Times in seconds. Defaults follow the cluster file's."""

    rules: PlacementRules = field(default_factory=PlacementRules)
    rebalance: RebalanceRules = field(default_factory=RebalanceRules)
    leader_lease_s: float = 3.0
    lease_s: float = 3.0  # of a request; also how long the store must have been reachable before leases are reaped
    lost_s: float = 3.0  # an instance without a sign of life for this long is LOST
    suspect_s: float = 1.5  # ... and after this long it gets nothing new
    retain_s: float = 600.0
    max_attempts: int = 3
    batch_requests: int = 32
    queue_limit: int = 256  # requests looked at in one turn
    reap_limit: int = 64
    reap_every_s: float = 0.25
    view_gap_s: float = 0.0015  # between two views, however many hints come
    view_idle_s: float = 0.1  # between two views when no hint comes
    lead_retry_s: float = 0.25  # between two attempts while another core leads
    patience_s: float = 1.0  # how long later requests may pass one that does not fit
    backoff_first_s: float = 0.05  # between attempts to reach a store that is away; doubles up to backoff_last_s
    backoff_last_s: float = 1.0
