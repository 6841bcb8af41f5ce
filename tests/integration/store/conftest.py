"""The functions of the library on every server that is here, with the invariants checked after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.store.embedded import EmbeddedValkey
from tests.support.store import RawStore, any_server, new_cluster
from tests.support.store_invariants import check_store
from tests.support.store_world import World

__all__ = ["any_server"]


@pytest.fixture
def world(any_server: EmbeddedValkey) -> Iterator[World]:
    """A cluster of its own; the store is whole at the end of the test."""
    raw = RawStore(any_server.url, new_cluster())
    yield World(raw)
    check_store(raw)
    raw.close()
