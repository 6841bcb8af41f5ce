"""What one worker process is told when it starts; JSON is its wire form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import Name, Seconds, Section
from configs.schema.cluster import SchedulingConfig, TimingConfig
from configs.schema.network import NetworkConfig
from configs.schema.pools import EngineConfig, ModelConfig


class WorkerSpec(Section):
    """One rank of one instance. `model_dump_json()` travels to the process, `model_validate_json()` reads it there.

    `model_dir` is the checkpoint folder on the worker's node, none for the oracle. `node_address` is the address that the
    instance advertises, none for loopback. `head_address` is that of rank 0 for ranks above it, when it is known already.

    `handoff_keys_file` holds the keys of capabilities (protos/contract/capability.py), read again when it changes; none:
    hand-offs are taken without a capability, which is for bare workers in tests.

    `cache_dir` is the folder on the worker's node below which `engine.disk_cache` has its files when it names no path.

    `failpoints` is for tests only and empty in production: `{"handoff.mid_push#3": "kill"}` ends the process at the third
    pass of that point. Points and actions are in workers/service/failpoints.py.
    """

    cluster: Name
    instance_id: Name
    pool: Name
    role: Literal["prefill", "decode", "combined"]
    rank: Annotated[int, Field(ge=0, le=63)] = 0
    ranks: Annotated[int, Field(ge=1, le=64)] = 1
    model: ModelConfig
    model_dir: str | None = None
    engine: EngineConfig
    store_url: Annotated[str, Field(pattern=r"^(redis|rediss|unix)://")]
    network: NetworkConfig = NetworkConfig()
    timing: TimingConfig = TimingConfig()
    scheduling: SchedulingConfig = SchedulingConfig()
    head_address: str | None = None
    node_address: str | None = None
    store_timeout_s: Seconds = 1.0
    handoff_keys_file: str | None = None
    cache_dir: str | None = None
    failpoints: dict[str, str] = Field(default_factory=dict)
