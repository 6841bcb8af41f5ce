"""From the cluster file to a torch engine."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.model_card import card_of
from configs.schema.pools import EngineConfig, ModelConfig
from protos.contract.errors import ModelError
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.engine_api.protocol import Engine
from workers.engine_api.types import ModelIdentity
from workers.engines.torch.config import read_config
from workers.engines.torch.models.registry import load_decoder
from workers.engines.torch.runner import TorchRunner, layout_of
from workers.engines.torch.weights import weights_digest
from workers.grammar.matching import LlguidanceConstrainer
from workers.grammar.vocabulary import vocabulary_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def create_engine(model: ModelConfig, engine: EngineConfig, model_dir: Path) -> Engine:
    """Loads the checkpoint and returns an engine that is ready to step.

    `engine.threads` sets torch's threads for the whole process. Raises ModelError, naming the key or the tensor, when
    the checkpoint cannot be served as the cluster file asks.
    """
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    runner = create_runner(model, engine, model_dir)
    return PagedEngine(
        runner,
        EngineLimits(
            max_batch_tokens=engine.max_batch_tokens, max_running=engine.max_running, prefix_cache=engine.prefix_cache
        ),
        _constrainer(runner.identity, model_dir),
    )


def _constrainer(identity: ModelIdentity, model_dir: Path) -> LlguidanceConstrainer | None:
    vocabulary = vocabulary_of(model_dir, identity.vocab_size, identity.eos_token_ids)
    if vocabulary is None:
        return None
    return LlguidanceConstrainer(vocabulary, identity.vocab_size, identity.eos_token_ids)


def create_runner(model: ModelConfig, engine: EngineConfig, model_dir: Path) -> TorchRunner:
    """The runner below the engine. Raises ModelError."""
    card = card_of(model, model_dir)
    config = read_config(model_dir)
    dtype, device = _DTYPES[model.dtype], _device(engine)
    if model.deterministic and dtype is not torch.float32:
        raise ModelError(
            f"model {model.name}: deterministic needs dtype float32; in {model.dtype} the size of a batch moves the last bits"
        )
    identity = ModelIdentity(
        model=model.name,
        architecture=config.architecture,
        weights_digest=weights_digest(model_dir),
        tokenizer_digest=card.tokenizer_digest,
        vocab_size=config.vocab_size,
        context_tokens=card.context_tokens,
        eos_token_ids=card.eos_token_ids,
    )
    return TorchRunner(
        decoder=load_decoder(config, model_dir, dtype, device, compressed=engine.weights == "stored"),
        identity=identity,
        layout=layout_of(config, dtype, engine.block_tokens),
        num_blocks=engine.num_blocks,
        dtype=dtype,
        device=device,
    )


def _device(engine: EngineConfig) -> torch.device:
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("engine device cuda: torch finds no CUDA device here; use device cpu or install a CUDA build of torch")
    return torch.device(engine.device)
