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
COSTS_S: dict[str, int] = {
    "tests/parity/test_disaggregated_transformers.py": 100,
    "tests/parity/test_torch_demo_model.py": 60,
    "tests/contract/test_torch_engine.py": 40,
    "tests/unit/workers/torch_engine/test_checkpoint_memory.py": 38,
    "tests/unit/workers/torch_engine/test_demo_model.py": 30,
    "tests/unit/workers/torch_engine/test_fixed_rows.py": 25,
    "tests/property/test_core.py": 24,
    "tests/parity/test_native_kernels.py": 20,
    "tests/parity/test_torch_transformers.py": 20,
    "tests/property/test_store_machine.py": 18,
    "tests/unit/workers/grammar/test_engine.py": 12,
    "tests/unit/workers/torch_engine/test_checkpoint_formats.py": 11,
    "tests/property/test_paged_engine.py": 9,
    "tests/unit/workers/grammar/test_demo_vocabulary.py": 7,
    "tests/integration/runtime/test_ray_launcher.py": 80,
    "tests/e2e/test_commands.py": 60,
    "tests/chaos/test_worker_death.py": 58,
    "tests/chaos/test_rank_death.py": 50,
    "tests/chaos/test_move_death.py": 42,
    "tests/e2e/test_ranks.py": 40,
    "tests/chaos/test_ray_nodes.py": 39,
    "tests/e2e/test_moves.py": 30,
    "tests/chaos/test_soak.py": 33,
    "tests/integration/store/test_embedded.py": 17,
    "tests/integration/workers/test_fencing.py": 17,
    "tests/integration/workers/test_process.py": 17,
    "tests/e2e/test_load.py": 16,
    "tests/e2e/test_prefix_cluster.py": 14,
    "tests/e2e/test_cancel_stages.py": 12,
    "tests/integration/workers/test_cancel.py": 12,
    "tests/integration/workers/test_moves.py": 11,
    "tests/chaos/test_kv_attacks.py": 10,
}


def rank(path: str) -> tuple[bool, int]:
    """Sorts files; equal ones keep the order in which they were found."""
    return path.startswith(WATCHING_THE_CLOCK), -COSTS_S.get(path, 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The hook, for tests/conftest.py."""
    items.sort(key=lambda item: rank(item.path.relative_to(ROOT).as_posix()))
