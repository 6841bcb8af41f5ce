"""Fixtures that every test may use."""

from __future__ import annotations

import workers.engines.torch  # noqa: F401  # its thread settings count only before torch is imported
from tests.support.store import embedded_valkey, fresh_store

__all__ = ["embedded_valkey", "fresh_store"]
