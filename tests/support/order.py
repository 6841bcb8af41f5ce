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
    "tests/parity/test_disaggregated_transformers.py": 110,
    "tests/parity/test_torch_demo_model.py": 60,
    "tests/contract/test_torch_engine.py": 35,
    "tests/unit/workers/torch_engine/test_fixed_rows.py": 30,
    "tests/unit/workers/torch_engine/test_checkpoint_memory.py": 30,
    "tests/parity/test_native_kernels.py": 25,
    "tests/unit/workers/torch_engine/test_demo_model.py": 25,
    "tests/parity/test_torch_transformers.py": 25,
    "tests/property/test_core.py": 15,
    "tests/unit/workers/grammar/test_engine.py": 14,
    "tests/unit/workers/torch_engine/test_checkpoint_formats.py": 12,
    "tests/property/test_paged_engine.py": 8,
    "tests/unit/workers/torch_engine/test_sampler.py": 8,
    "tests/unit/workers/torch_engine/test_moves.py": 8,
    "tests/unit/workers/grammar/test_demo_vocabulary.py": 7,
    "tests/property/test_store_machine.py": 7,
    "tests/e2e/test_ranks.py": 60,
    "tests/chaos/test_worker_death.py": 60,
    "tests/chaos/test_rank_death.py": 50,
    "tests/integration/runtime/test_ray_launcher.py": 50,
    "tests/e2e/test_commands.py": 45,
    "tests/chaos/test_move_death.py": 40,
    "tests/chaos/test_ray_nodes.py": 40,
    "tests/chaos/test_soak.py": 33,
    "tests/e2e/test_moves.py": 30,
    "tests/e2e/test_rebalance.py": 25,
    "tests/integration/workers/test_process.py": 25,
    "tests/e2e/test_structured_output.py": 15,
    "tests/integration/workers/test_torch_ranks.py": 15,
    "tests/e2e/test_load.py": 15,
    "tests/integration/workers/test_fencing.py": 15,
    "tests/integration/workers/test_shared_memory.py": 12,
    "tests/e2e/test_cancel_stages.py": 12,
    "tests/e2e/test_prefix_cluster.py": 12,
    "tests/e2e/test_tls_handshakes.py": 10,
    "tests/chaos/test_kv_attacks.py": 10,
    "tests/integration/workers/test_cancel.py": 10,
    "tests/integration/workers/test_moves.py": 10,
    "tests/e2e/test_sampling.py": 10,
    "tests/e2e/test_readme.py": 9,
    "tests/integration/ingress/test_front_door.py": 9,
    "tests/integration/ingress/test_store_loss.py": 9,
}


def rank(path: str) -> tuple[bool, int]:
    """Sorts files; equal ones keep the order in which they were found."""
    return path.startswith(WATCHING_THE_CLOCK), -COSTS_S.get(path, 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The hook, for tests/conftest.py."""
    items.sort(key=lambda item: rank(item.path.relative_to(ROOT).as_posix()))
