"""The cluster file: `autan up FILE`. `autan config show FILE` prints it with every default filled in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.address import parse_address
from configs.schema.base import Line, Name, Seconds, Section, refusal
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
    address: Line | None = None  # of an existing Ray cluster; none: a local one
    num_cpus: Annotated[int, Field(ge=1, le=4096)] | None = None
    object_store_mb: Annotated[int, Field(ge=80, le=1_048_576)] = 96
    start_timeout_s: Seconds = 120.0

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.address is not None and self.kind != "ray":
            raise refusal([(("address",), "is for launcher.kind: ray; subprocess starts everything on this machine")])
        if self.address is not None and self.num_cpus is not None:
            raise refusal([(("num_cpus",), "is for a local Ray; the cluster at launcher.address has its own count")])
        return self


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
            message = (
                f"{self.lease_s} is below three times heartbeat_s ({self.heartbeat_s}): one late renewal would end the lease"
            )
            raise refusal([(("lease_s",), message)])
        return self


class RebalanceConfig(Section):
    """When running requests move between decode instances by themselves; instances that drain are emptied in any case.

    A reason must hold for `settle_s`: a difference of `gap` of the pool in free KV blocks, a request that waits for blocks
    which the instances have only together, an instance that preempts. What has fewer than `min_left_tokens` to go stays.
    """

    enabled: bool = True
    gap: Annotated[float, Field(gt=0, le=1)] = 0.25
    settle_s: Annotated[float, Field(ge=0, le=3600)] = 1.0
    cool_down_s: Annotated[float, Field(ge=0, le=3600)] = 5.0
    max_moves_per_instance: Annotated[int, Field(ge=1, le=64)] = 4
    min_left_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 64


class PrefixFetchConfig(Section):
    """When a prompt's first KV blocks come from the cache of another instance instead of being computed again.

    Moving `min_blocks` or more must be predicted, at `link_bytes_per_s`, to be faster than computing them by `margin`.
    """

    enabled: bool = True
    min_blocks: Annotated[int, Field(ge=1, le=4096)] = 4
    link_bytes_per_s: Annotated[float, Field(gt=0, le=1e12)] = 400e6
    margin: Annotated[float, Field(ge=1, le=100)] = 1.5


class SchedulingConfig(Section):
    """Bounds of the queue and of retries."""

    max_queued: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    max_migrations: Annotated[int, Field(ge=0, le=100)] = 3
    batch_requests: Annotated[int, Field(ge=1, le=64)] = 32
    local_prefill_without_prefill_pool: bool = True
    rebalance: RebalanceConfig = RebalanceConfig()
    prefix_fetch: PrefixFetchConfig = PrefixFetchConfig()


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
    def _sections_agree(self) -> Self:
        findings = [
            *_pool_names(self.pools),
            *_roles(self.pools),
            *_engines(self.model, self.pools),
            *_exposure(self),
            *_exact(self),
        ]
        if findings:
            raise refusal(findings)
        return self


Finding = tuple[tuple[str | int, ...], str]


def _pool_names(pools: list[PoolConfig]) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for index, pool in enumerate(pools):
        if pool.name in first:
            yield ("pools", index, "name"), f"{pool.name!r} is the name of pools[{first[pool.name]}] already"
        first.setdefault(pool.name, index)


def _roles(pools: list[PoolConfig]) -> Iterator[Finding]:
    roles = {pool.role for pool in pools}
    if "combined" not in roles and roles != {"prefill", "decode"}:
        yield ("pools",), f"need a prefill and a decode pool, or a combined one; there is only {', '.join(sorted(roles))}"


def _engines(model: ModelConfig, pools: list[PoolConfig]) -> Iterator[Finding]:
    for index, pool in enumerate(pools):
        engine = pool.engine
        if (engine.kind == "oracle") != (model.source == "oracle"):
            yield (
                ("pools", index, "engine", "kind"),
                f"{engine.kind!r} does not go with model.source {model.source!r}: the oracle engine serves the oracle alone",
            )
        if engine.block_tokens != pools[0].engine.block_tokens:
            yield (
                ("pools", index, "engine", "block_tokens"),
                f"{engine.block_tokens} differs from the {pools[0].engine.block_tokens} of pools[0]: "
                "blocks could not be handed over",
            )


def _exact(cluster: ClusterConfig) -> Iterator[Finding]:
    if cluster.model.deterministic and cluster.network.kv_compression == "fp8":
        yield (
            ("network", "kv_compression"),
            "'fp8' changes tokens, and model.deterministic promises that nothing does: use 'lossless' or 'none'",
        )


def _exposure(cluster: ClusterConfig) -> Iterator[Finding]:
    network, ingress = cluster.network, cluster.ingress
    address = parse_address(ingress.address)
    if not address.is_local and not network.insecure and network.tls is None and ingress.tls is None:
        yield (
            ("ingress", "address"),
            f"{ingress.address!r} can be reached from other machines and needs TLS (ingress.tls or network.tls): "
            "use 127.0.0.1 or unix:///path, or say network.insecure: true on a network that you trust",
        )
    if ingress.tls is not None and address.path:
        yield ("ingress", "tls"), "is for TCP; a unix socket is the user's own and has no TLS"
    elif ingress.tls is not None and ingress.keys_file is None:
        yield ("ingress", "tls"), "needs ingress.keys_file: its certificates do not say who calls"
    if network.bind == "node" and network.tls is not None and not network.insecure:
        for index, pool in enumerate(cluster.pools):
            if pool.ranks > 1:
                yield (
                    ("pools", index, "ranks"),
                    f"{pool.ranks} ranks on the nodes' addresses compute over connections that have no TLS: "
                    "say network.insecure: true when the network between the nodes is private (everything else keeps its TLS)",
                )
