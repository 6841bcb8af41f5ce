"""The engine of a worker, by kind. Heavy libraries load with the kind that needs them."""

from __future__ import annotations

from pathlib import Path

from configs.schema.pools import EngineConfig, ModelConfig
from protos.contract.errors import ConfigError
from workers.engine_api.protocol import Engine


def build_engine(model: ModelConfig, engine: EngineConfig, model_dir: Path | None) -> Engine:
    """The engine of this model. Raises ConfigError for a kind that is not here, ModelError for an unusable checkpoint."""
    if engine.kind == "oracle":
        from workers.engines.oracle import build as oracle

        return oracle.create_engine(model, engine)
    if engine.kind == "torch":
        if model_dir is None:
            raise ConfigError(f"model.source: the torch engine needs the checkpoint folder of {model.name}")
        from workers.engines.torch import build as torch_build

        return torch_build.create_engine(model, engine, model_dir)
    raise ConfigError(f"engine.kind: {engine.kind} is not available in this build; use oracle or torch")
