"""Fixtures that every test may use."""

from __future__ import annotations

from hypothesis import settings

from tests.support.command import autan
from tests.support.demo_model import demo_model_dir
from tests.support.order import pytest_collection_modifyitems
from tests.support.store import embedded_valkey, fresh_store
from tests.support.threads import two_threads, use_one_thread

__all__ = ["autan", "demo_model_dir", "embedded_valkey", "fresh_store", "pytest_collection_modifyitems", "two_threads"]

use_one_thread()

# No test fails for being slow on a busy machine.
settings.register_profile("autan", deadline=None)
settings.load_profile("autan")
