"""Fixtures that every test may use."""

from __future__ import annotations

from tests.support.command import autan
from tests.support.demo_model import demo_model_dir
from tests.support.store import embedded_valkey, fresh_store

__all__ = ["autan", "demo_model_dir", "embedded_valkey", "fresh_store"]
