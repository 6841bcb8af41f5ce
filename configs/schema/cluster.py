"""The cluster file: `autan up FILE`. `autan config show FILE` prints it with every default filled in."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Name, Seconds, Section
from configs.schema.network import IngressConfig, NetworkConfig
from configs.schema.pools import ModelConfig, PoolConfig


class StoreConfig(Section):
    """Where the requests live. No url: an embedded Valkey on a unix socket in the run directory."""

    url: Annotated[str, Field(pattern=r"^(redis|rediss|unix)://")] | None = None
    fsync: Literal["everysec", "always"] = "everysec"
    max_memory_mb: Annotated[int, Field(ge=16, le=1_048_576)] = 512
    timeout_s: Seconds = 1.0


class LauncherConfig(Section):
    """What starts the workers: `ray` on this or many nodes, `subprocess` on this one without Ray."""

    kind: Literal["ray", "subprocess"] = "ray"
    address: str | None = None  # of an existing Ray cluster; none: a local one
    num_cpus: Annotated[int, Field(ge=1, le=4096)] | None = None
    object_store_mb: Annotated[int, Field(ge=80, le=1_048_576)] = 96
    start_timeout_s: Seconds = 120.0


class TimingConfig(Section):
    """Leases and deadlines; defaults of DESIGN section 7."""

    heartbeat_s: Seconds = 0.5
    lease_s: Seconds = 3.0
    kv_lease_s: Seconds = 10.0
    progress_timeout_s: Seconds = 10.0
    drain_s: Seconds = 30.0
    request_timeout_s: Seconds = 600.0
    retain_s: Seconds = 600.0
    leader_lease_s: Seconds = 3.0

    @model_validator(mode="after")
    def _lease_outlives_heartbeats(self) -> Self:
        if self.lease_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"lease_s ({self.lease_s}) must be at least three times heartbeat_s ({self.heartbeat_s}): "
                "one late renewal would end the lease"
            )
        return self


class SchedulingConfig(Section):
    """Bounds of the queue and of retries."""

    max_queued: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    max_migrations: Annotated[int, Field(ge=0, le=100)] = 3
    batch_requests: Annotated[int, Field(ge=1, le=64)] = 32
    local_prefill_without_prefill_pool: bool = True


class ClusterConfig(Section):
    """One cluster, whole."""

    version: Literal[1] = 1
    name: Name
    model: ModelConfig
    pools: Annotated[list[PoolConfig], Field(min_length=1, max_length=64)]
    store: StoreConfig = StoreConfig()
    launcher: LauncherConfig = LauncherConfig()
    network: NetworkConfig = NetworkConfig()
    ingress: IngressConfig = IngressConfig()
    timing: TimingConfig = TimingConfig()
    scheduling: SchedulingConfig = SchedulingConfig()

    @model_validator(mode="after")
    def _pools_can_serve(self) -> Self:
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise ValueError(f"pools: names must differ, got {', '.join(names)}")
        roles = {pool.role for pool in self.pools}
        if "combined" not in roles and roles != {"prefill", "decode"}:
            raise ValueError("pools: need a prefill and a decode pool, or a combined one")
        return self
