"""The order of the files, for two processes that share them: the costly ones first, those that watch the clock last.

A process takes whole files, so that what a module sets up is set up once. Costly files come first, so that both processes end
at about the same time. Clusters of real processes come after everything that only computes: they wait for leases, restarts
and each other, and are not to share the cores with a process that never waits.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WATCHING_THE_CLOCK = ("tests/integration/", "tests/e2e/", "tests/chaos/")

# Files that take long, in seconds of an idle machine. A file that is not here is taken for a quick one.
COSTS_S: dict[str, int] = {}


def rank(path: str) -> tuple[bool, int]:
    """Sorts files; equal ones keep the order in which they were found."""
    return path.startswith(WATCHING_THE_CLOCK), -COSTS_S.get(path, 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The hook, for tests/conftest.py."""
    items.sort(key=lambda item: rank(item.path.relative_to(ROOT).as_posix()))
