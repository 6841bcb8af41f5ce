"""A real store for tests: one embedded server for each module, a fresh cluster name for each test."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis

from orchestrator.store.client import Store
from orchestrator.store.embedded import EmbeddedValkey
from orchestrator.store.library import library_text
from protos.contract.redis_names import Fn, base_key

T = TypeVar("T")
_names = itertools.count(1)


class LoopThread:
    """An event loop in a thread of its own, for what must go on while a test runs."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        """Runs a coroutine on the loop and returns its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def close(self) -> None:
        """Ends loop and thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@dataclass(frozen=True)
class FreshStore:
    """A server and a cluster name that no other test uses."""

    url: str
    cluster: str

    async def connect(self, timeout_s: float = 5.0) -> Store:
        """A client with the library loaded; the caller closes it."""
        return await Store.connect(self.url, self.cluster, timeout_s)

    def raw(self) -> RawStore:
        """A blocking client that calls the functions by name; close it."""
        return RawStore(self.url, self.cluster)


class RawStore:
    """Calls functions as they are, for the sides of the contract that the orchestrator's client does not have."""

    def __init__(self, url: str, cluster: str) -> None:
        self.base = base_key(cluster)
        self.redis = redis.Redis.from_url(url, socket_timeout=10, protocol=2)
        self.redis.function_load(library_text(), replace=True)

    def call(self, function: Fn, *arguments: str | bytes | int) -> list[Any]:
        """The reply, with ASCII as text: only what is not ASCII stays bytes."""
        return [_plain(value) for value in self.redis.fcall(function, 1, self.base, *arguments)]

    def close(self) -> None:
        """Closes the connection."""
        self.redis.close()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes) and value.isascii():
        return value.decode()
    return value


def start_server(directory: Path, binary: Path | None = None) -> Iterator[EmbeddedValkey]:
    """Yields a running server; the end of the iterator stops it."""
    thread = LoopThread()
    server = EmbeddedValkey(directory, binary=binary)
    try:
        thread.run(server.start())
        yield server
    finally:
        thread.run(server.stop())
        thread.close()


@pytest.fixture(scope="module")
def embedded_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """An embedded Valkey for the tests of one module."""
    yield from start_server(tmp_path_factory.mktemp("valkey"))


def _servers() -> list[Any]:
    other = shutil.which("redis-server")
    skip = pytest.mark.skipif(other is None, reason="no redis-server on PATH")
    return [pytest.param(None, id="valkey"), pytest.param(other and Path(other), id="redis", marks=skip)]


@pytest.fixture(scope="module", params=_servers())
def any_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """The embedded Valkey, and the machine's own redis-server where there is one."""
    yield from start_server(tmp_path_factory.mktemp("server"), request.param)


def new_cluster() -> str:
    """A cluster name that no other test uses."""
    return f"t{os.getpid()}-{next(_names)}"


@pytest.fixture
def fresh_store(embedded_valkey: EmbeddedValkey) -> FreshStore:
    """The module's server under a new cluster name."""
    return FreshStore(embedded_valkey.url, new_cluster())
