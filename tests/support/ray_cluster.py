"""Several Ray nodes on one machine, each with an address of its own, and the faults that can befall them.

Nodes live on 127.0.0.2, 127.0.0.3, ... (the head on the machine's address: Ray rewrites 127.0.0.1). Measured with the tuned
health checks below on two cores: a killed raylet is noticed after 1.1 s and its placement group runs elsewhere after 2.8 s;
a frozen one after 3.0 s and 4.2 s. Either way the actors of the old node live on, some for as long as one watches.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from tests.support.processes import process_state, wait_until

# With Ray's own defaults a killed raylet is noticed after 15 s and a frozen one after 65 s.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
MARK = "AUTAN_TEST_RAY"  # in the environment of every process of the cluster
_OBJECT_STORE_BYTES = 80 * 1024 * 1024


class RayNodes:
    """A running cluster. The head has CPUs enough for the driver only, so that instances land on the nodes."""

    def __init__(self, mark: str) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_system_config": HEALTH_CHECKS,
            },
        )
        self._nodes: dict[str, Any] = {}
        self._frozen: set[int] = set()
        self._mark = mark

    @property
    def address(self) -> str:
        """For `launcher.address`."""
        return str(self._cluster.address)

    def add(self, *, cpus: float = 1, gpus: float = 0, resources: Mapping[str, float] | None = None) -> str:
        """Starts a node with made-up resources and returns its address; it may take a second until Ray shows it alive."""
        address = f"127.0.0.{len(self._nodes) + 2}"
        self._nodes[address] = self._cluster.add_node(
            wait=False,
            num_cpus=cpus,
            num_gpus=gpus,
            resources=dict(resources or {}),
            object_store_memory=_OBJECT_STORE_BYTES,
            node_ip_address=address,
        )
        return address

    def raylet_pid(self, address: str) -> int:
        """The process of a node's raylet."""
        return int(self._nodes[address].all_processes["raylet"][0].process.pid)

    def kill_raylet(self, address: str) -> None:
        """SIGKILL; returns when it is gone."""
        pid = self.raylet_pid(address)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: process_state(pid) == "", f"raylet {pid} is dead", 5.0)

    def freeze_raylet(self, address: str) -> None:
        """SIGSTOP; returns when it stands."""
        pid = self.raylet_pid(address)
        os.kill(pid, signal.SIGSTOP)
        self._frozen.add(pid)
        wait_until(lambda: process_state(pid) == "T", f"raylet {pid} stands", 5.0)

    def thaw_raylet(self, address: str) -> None:
        """SIGCONT."""
        pid = self.raylet_pid(address)
        self._frozen.discard(pid)
        os.kill(pid, signal.SIGCONT)

    def alive(self) -> set[str]:
        """Addresses of the nodes that Ray holds for alive, without the head. For a driver."""
        import ray

        return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]} & set(self._nodes)

    def wait_alive(self, timeout_s: float = 20.0) -> None:
        """Returns when every node was seen alive. For a driver."""
        wait_until(lambda: self.alive() == set(self._nodes), "all Ray nodes are alive", timeout_s)

    def close(self) -> None:
        """Ends the cluster and every process that it left behind: workers outlive a raylet that was killed or frozen."""
        for pid in self._frozen:
            os.kill(pid, signal.SIGCONT)
        self._cluster.shutdown()
        leftovers = [process for process in psutil.process_iter() if _is_marked(process, self._mark)]
        for process in leftovers:
            process.kill()
        psutil.wait_procs(leftovers, timeout=5.0)


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == mark
    except psutil.Error:
        return False


@contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """A cluster without nodes; everything is gone afterwards, the driver's connection included.

    Ray reads mode and token once for a process, on import: they stay set, and are the same for every cluster of the run.
    """
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
        os.environ.setdefault(name, value)
    os.environ[MARK] = secrets.token_hex(8)
    import ray

    nodes = RayNodes(os.environ[MARK])
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.close()
        del os.environ[MARK]
