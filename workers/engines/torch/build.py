"""From the cluster file to a torch engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from configs.model_card import ModelCard, card_of
from configs.schema.pools import EngineConfig, ModelConfig
from protos.contract.errors import ModelError
from workers.batching.engine_limits import EngineLimits
from workers.batching.paged_engine import PagedEngine
from workers.batching.runner import Runner
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.protocol import Engine
from workers.engine_api.types import KvLayout, ModelIdentity
from workers.engines.torch.config import DecoderConfig, read_config
from workers.engines.torch.fixed_rows import FixedRowSteps
from workers.engines.torch.graphs import GraphedSteps
from workers.engines.torch.load_progress import Progress, silent
from workers.engines.torch.models.decoder import Decoder
from workers.engines.torch.ranks import SOLO, Ranks
from workers.engines.torch.registry import load_decoder
from workers.engines.torch.runner import TorchRunner, layout_of
from workers.engines.torch.steps import EagerSteps, Steps
from workers.engines.torch.weights import weights_digest
from workers.grammar.matching import LlguidanceConstrainer
from workers.grammar.vocabulary import vocabulary_of
from workers.kv_tiers.build import disk_files

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def create_engine(
    model: ModelConfig,
    engine: EngineConfig,
    model_dir: Path,
    progress: Progress = silent,
    memory: PoolMemory | None = None,
    cache_dir: Path | None = None,
) -> Engine:
    """Loads the checkpoint, with progress, and returns an engine that is ready to step.

    `engine.threads` sets torch's threads for the whole process. Raises ModelError, naming the key or the tensor, when
    the checkpoint cannot be served as the cluster file asks, and ConfigError for a disk cache that could hold nothing.
    """
    set_threads(engine)
    return engine_over(create_runner(model, engine, model_dir, progress, memory), engine, model_dir, cache_dir)


def set_threads(engine: EngineConfig) -> None:
    """Sets torch's threads for the whole process."""
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)


def engine_over(runner: Runner, engine: EngineConfig, model_dir: Path, cache_dir: Path | None = None) -> Engine:
    """The batching engine over a runner; `cache_dir` is the folder of its disk cache."""
    return PagedEngine(
        runner,
        EngineLimits(
            max_batch_tokens=engine.max_batch_tokens,
            max_running=engine.max_running,
            prefix_cache=engine.prefix_cache,
            host_cache_bytes=int(engine.host_cache_gb * 1e9),
        ),
        _constrainer(runner.identity, model_dir),
        files=disk_files(engine, cache_dir, runner.identity, runner.layout),
    )


def _constrainer(identity: ModelIdentity, model_dir: Path) -> LlguidanceConstrainer | None:
    vocabulary = vocabulary_of(model_dir, identity.vocab_size, identity.eos_token_ids)
    if vocabulary is None:
        return None
    return LlguidanceConstrainer(vocabulary, identity.vocab_size, identity.eos_token_ids)


def create_runner(
    model: ModelConfig,
    engine: EngineConfig,
    model_dir: Path,
    progress: Progress = silent,
    memory: PoolMemory | None = None,
) -> TorchRunner:
    """The runner below the engine of one rank alone. Raises ModelError."""
    parts = read_parts(model, engine, model_dir)
    return make_runner(parts, model, parts.load(SOLO, progress), parts.layout, alone=True, memory=memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerParts:
    """What the cluster file and the small files of a checkpoint say of a runner, on every rank alike."""

    config: DecoderConfig
    card: ModelCard
    engine: EngineConfig
    model_dir: Path
    dtype: torch.dtype
    device: torch.device
    layout: KvLayout  # of full rows
    deterministic: bool

    def load(self, ranks: Ranks, progress: Progress = silent) -> Decoder:
        """The decoder with this rank's weights. Raises ModelError."""
        compressed = self.engine.weights == "stored"
        return load_decoder(
            self.config,
            self.model_dir,
            self.dtype,
            self.device,
            progress,
            ranks,
            compressed=compressed,
            fixed_rows=self.deterministic,
            native_rows=self.engine.max_batch_tokens,
        )

    def steps(self, *, alone: bool = False) -> Steps:
        """How a step runs through the decoder; the same on every rank. `alone`: no other rank takes part."""
        if self.deterministic:
            return FixedRowSteps()
        return GraphedSteps() if alone and self.device.type == "cuda" else EagerSteps()


def read_parts(model: ModelConfig, engine: EngineConfig, model_dir: Path, rank: int = 0) -> RunnerParts:
    """Reads everything but the weights. Raises ModelError."""
    card = card_of(model, model_dir)
    config = read_config(model_dir)
    dtype = _DTYPES[model.dtype]
    return RunnerParts(
        config=config,
        card=card,
        engine=engine,
        model_dir=model_dir,
        dtype=dtype,
        device=_device(engine, rank),
        layout=layout_of(config, dtype, engine.block_tokens),
        deterministic=model.deterministic,
    )


def make_runner(
    parts: RunnerParts,
    model: ModelConfig,
    decoder: Decoder,
    layout: KvLayout,
    *,
    alone: bool = False,
    memory: PoolMemory | None = None,
) -> TorchRunner:
    """A runner whose pool has this layout: that of full rows, or of one rank's share of them. On a CPU it is in `memory`."""
    identity = ModelIdentity(
        model=model.name,
        architecture=parts.config.architecture,
        weights_digest=weights_digest(parts.model_dir),
        tokenizer_digest=parts.card.tokenizer_digest,
        template_digest=parts.card.template_digest,
        vocab_size=parts.config.vocab_size,
        context_tokens=parts.card.context_tokens,
        eos_token_ids=parts.card.eos_token_ids,
    )
    return TorchRunner(
        decoder=decoder,
        identity=identity,
        layout=layout,
        num_blocks=parts.engine.num_blocks,
        dtype=parts.dtype,
        device=parts.device,
        steps=parts.steps(alone=alone),
        memory=memory,
    )


def _device(engine: EngineConfig, rank: int) -> torch.device:
    if engine.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelError("engine device cuda: torch finds no CUDA device here; use device cpu or install a CUDA build of torch")
    # Under Ray each rank sees the one device that it was given; plain processes see all of the machine's.
    return torch.device("cuda", rank % torch.cuda.device_count())
