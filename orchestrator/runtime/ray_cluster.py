"""Connecting to Ray: a local cluster of our own, or an existing one. Ray is imported here and in ray_launcher only.

Ray listens on all interfaces whatever it is told, so token authentication is always on: a local cluster gets a token of
its own that only its processes know.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
from typing import Any

from configs.env import child_environment, set_for_libraries
from configs.schema.cluster import ClusterConfig, LauncherConfig
from configs.schema.pools import PoolConfig
from protos.contract.errors import ClusterUnreachable, ConfigError

_CONNECT_TIMEOUT_S = 3.0
_MIB = 1024 * 1024


def namespace_of(cluster: str) -> str:
    """The Ray namespace in which the actors of a cluster have their names."""
    return f"autan-{cluster}"


def connect_ray(cluster: ClusterConfig) -> None:
    """Connects this process to Ray; blocks for seconds. Without `launcher.address` it starts a local cluster that ends with it.

    Raises ClusterUnreachable when nothing answers at `config.address`, ConfigError when the token is refused or missing,
    or when this process is connected to another Ray already.
    """
    config = cluster.launcher
    defaults = {"RAY_AUTH_MODE": "token", "RAY_DEDUP_LOGS": "0"}
    if config.address is None:
        defaults |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    else:
        defaults |= {"RAY_NUM_REDIS_GET_RETRIES": "2"}  # a second each, before a refused token is reported
    assert "ray" not in sys.modules or "RAY_AUTH_MODE" in child_environment(), (
        "Ray reads its authentication mode when it is imported"
    )
    set_for_libraries(defaults)
    import ray

    if ray.is_initialized():
        raise ConfigError("this process is connected to a Ray cluster already; one process serves one cluster")
    common: dict[str, Any] = {"namespace": namespace_of(cluster.name), "log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        ray.init(address="local", include_dashboard=False, **_local_resources(config, cluster.pools), **common)
        return
    _must_listen(config.address)
    try:
        ray.init(address=config.address, **common)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"launcher.address: {config.address} listens but refuses this driver ({error}); "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) must be those of the cluster"
        ) from error


def _local_resources(config: LauncherConfig, pools: list[PoolConfig]) -> dict[str, Any]:
    """Explicit counts: as many logical CPUs as the pools ask for, or as there are."""
    ranks = [(pool, pool.instances * pool.ranks) for pool in pools]
    asked_cpus = math.ceil(sum(pool.cpus_per_rank * count for pool, count in ranks))
    resources: dict[str, float] = {}
    for pool, count in ranks:
        for name, amount in pool.resources.items():
            resources[name] = resources.get(name, 0.0) + amount * count
    return {
        "num_cpus": config.num_cpus or max(os.cpu_count() or 1, asked_cpus),
        "resources": resources,
        "object_store_memory": config.object_store_mb * _MIB,
    }


def _must_listen(address: str) -> None:
    """Ray itself would try for minutes."""
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"launcher.address: {address!r} is not host:port, auto or ray://host:port")
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterUnreachable(f"launcher.address: no Ray at {address} ({error})") from error
