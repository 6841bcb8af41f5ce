"""The store: requests, leases and journals in Redis, behind one versioned Function library."""

from __future__ import annotations

from orchestrator.store.client import Store
from orchestrator.store.embedded import EmbeddedValkey
from orchestrator.store.replies import Emission, Placement

__all__ = ["EmbeddedValkey", "Emission", "Placement", "Store"]
