"""Fixtures that every test may use."""

from __future__ import annotations

from tests.support.store import embedded_valkey, fresh_store

__all__ = ["embedded_valkey", "fresh_store"]
