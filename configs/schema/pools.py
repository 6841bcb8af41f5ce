"""The model that a cluster serves and the pools of instances that serve it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Line, Name, Section, refusal


class ModelConfig(Section):
    """Which checkpoint, under which name.

    `source` is `oracle` (arithmetic, no weights), `demo` (SmolLM2-135M-Instruct, imported on first use),
    or the path of a checkpoint folder.
    """

    name: Name
    source: Line
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    context_tokens: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    deterministic: bool = False


class OracleCosts(Section):
    """What the oracle engine charges its clock; zero means as fast as arithmetic goes."""

    prefill_tokens_per_s: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    decode_step_s: Annotated[float, Field(ge=0, le=10)] = 0.0


class DiskCacheConfig(Section):
    """Blocks that host memory passes on, in files of the worker's node; they outlive the process.

    Each instance has a folder of its own, `<path>/<cluster>/<instance>`; without `path` it is below the run directory.
    """

    gb: Annotated[float, Field(gt=0, le=1_048_576, allow_inf_nan=False)]
    path: Line | None = None

    @model_validator(mode="after")
    def _absolute_path(self) -> Self:
        if self.path is not None and not self.path.startswith("/"):
            raise refusal([(("path",), f"{self.path} depends on where a worker starts: give an absolute path")])
        return self


class EngineConfig(Section):
    """How one instance computes.

    `weights` of a quantised checkpoint stay in memory as they are `stored`, or are `decoded` into the model's dtype while
    they are loaded: more memory, and faster where the device has no kernel for the stored format.

    `host_cache_gb` (10^9 bytes, per instance of one rank) keeps the blocks that the prefix cache of the pool gives up;
    `disk_cache` takes what comes back often enough from there, and so needs it.
    """

    kind: Literal["oracle", "torch", "vllm"]
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    weights: Literal["stored", "decoded"] = "stored"
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    num_blocks: Annotated[int, Field(ge=2, le=16_777_216)] = 512
    max_batch_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 512
    max_running: Annotated[int, Field(ge=1, le=65_536)] = 64
    prefix_cache: bool = True
    host_cache_gb: Annotated[float, Field(ge=0, le=65_536, allow_inf_nan=False)] = 0.0
    disk_cache: DiskCacheConfig | None = None
    oracle: OracleCosts = OracleCosts()

    @model_validator(mode="after")
    def _host_memory_in_front_of_the_disk(self) -> Self:
        if self.disk_cache is not None and not (self.host_cache_gb and self.prefix_cache):
            message = "blocks reach the disk through host memory: set host_cache_gb, and prefix_cache: true"
            raise refusal([(("disk_cache",), message)])
        return self


class PoolConfig(Section):
    """Instances of one role with equal engines."""

    name: Name
    role: Literal["prefill", "decode", "combined"]
    instances: Annotated[int, Field(ge=1, le=4096)] = 1
    ranks: Annotated[int, Field(ge=1, le=64)] = 1
    cpus_per_rank: Annotated[float, Field(ge=0, le=1024)] = 1.0
    gpus_per_rank: Annotated[float, Field(ge=0, le=64)] = 0.0
    resources: dict[Name, Annotated[float, Field(gt=0, le=1e9)]] = Field(default_factory=dict)  # of Ray, per rank
    engine: EngineConfig

    @model_validator(mode="after")
    def _one_rank_for_a_host_cache(self) -> Self:
        if self.ranks > 1 and self.engine.host_cache_gb:
            message = f"the host cache is for one rank, and ranks is {self.ranks}: use 0, or ranks: 1"
            keys = ["host_cache_gb", *(["disk_cache"] if self.engine.disk_cache is not None else [])]
            raise refusal([(("engine", key), message) for key in keys])
        return self
