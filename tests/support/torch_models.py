"""Tiny checkpoints, runners and engines for the torch tests, and the same models in transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from configs.schema.pools import EngineConfig, ModelConfig
from workers.batching.runner import Sampled, Slice
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, FinishReason, Phase, SamplingParams, TokenOut
from workers.engine_api.waiting import WorkWaiter
from workers.engines.torch.build import create_engine, create_runner
from workers.engines.torch.runner import TorchRunner

GREEDY = SamplingParams(max_tokens=64)


def engine_config(**fields: Any) -> EngineConfig:
    return EngineConfig(kind="torch", **{"num_blocks": 96, "block_tokens": 16, "max_batch_tokens": 64, **fields})


def a_runner(model_dir: Path, dtype: str = "float32", **fields: Any) -> TorchRunner:
    return create_runner(ModelConfig(name="tiny", source=str(model_dir), dtype=dtype), engine_config(**fields), model_dir)


def an_engine(model_dir: Path, dtype: str = "float32", **fields: Any) -> Engine:
    return create_engine(ModelConfig(name="tiny", source=str(model_dir), dtype=dtype), engine_config(**fields), model_dir)


def random_tokens(seed: int, count: int, vocab_size: int = 272, first: int = 16) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(first, vocab_size, (count,), generator=generator).tolist())


def tensors_of(model_dir: Path) -> dict[str, torch.Tensor]:
    """The weights under their names without a wrapper's prefix."""
    stored = load_file(model_dir / "model.safetensors")
    return {name.removeprefix("language_model."): tensor for name, tensor in stored.items()}


def exact_tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    """`tensors_of` in fp64, as the reference computes: converted once for many sequences."""
    return {name: tensor.double() for name, tensor in tensors_of(model_dir).items()}


def transformers_twin(model_dir: Path) -> Any:
    """The checkpoint as a transformers model in fp32, with the softmax scale of the released Mistral Small 4."""
    import transformers

    raw = json.loads((model_dir / "config.json").read_text())
    if raw["model_type"] != "mistral3":
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    else:
        text = raw["text_config"]
        text["rope_parameters"] |= {"mscale": 0, "mscale_all_dim": 0, "attention_factor": 1.0}
        model = transformers.Mistral4ForCausalLM(transformers.Mistral4Config(**text))
        model.load_state_dict(tensors_of(model_dir))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def transformers_greedy(model: Any, prompt: Sequence[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return [int(token) for token in out[0, len(prompt) :]]


def transformers_choices(model: Any, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
    """What transformers chooses after the prompt and after each prefix of the output: one pass instead of a generation.

    Equal to the output exactly when a greedy generation is.
    """
    ids = torch.tensor([[*prompt, *output[:-1]]])
    with torch.inference_mode():
        logits = model(ids, logits_to_keep=len(output)).logits[0]
    return [int(token) for token in logits.argmax(-1)]


def a_slice(tokens: Sequence[int], start: int, count: int, table: tuple[int, ...], **fields: Any) -> Slice:
    given = {"request_id": "r", "sampling": GREEDY, "sample": True, "output_index": 0, "num_prompt_tokens": len(tokens)}
    return Slice(tokens=tokens, start=start, count=count, block_table=table, **{**given, **fields})


class LogitsProbe:
    """A decoder that remembers the logits which the one inside it returned."""

    def __init__(self, runner: TorchRunner) -> None:
        self._inner = runner._decoder
        self.seen: list[torch.Tensor] = []
        runner._decoder = self

    def forward(self, batch: Any, cache: Any) -> torch.Tensor:
        logits = self._inner.forward(batch, cache)
        self.seen.append(logits.clone())
        return logits


def feed(runner: TorchRunner, tokens: Sequence[int], cuts: Sequence[int], table: tuple[int, ...]) -> list[Sampled]:
    """Feeds one sequence in the chunks that the cuts make; samples after each."""
    bounds = [0, *cuts, len(tokens)]
    return [runner.run([a_slice(tokens, start, end - start, table)])[0] for start, end in pairwise(bounds)]


def run_all(engine: Engine, requests: Sequence[EngineRequest], max_steps: int = 5000) -> dict[str, list[int]]:
    """Steps until nothing is left to do; the tokens of every request in order, checked for gaps and failures."""
    for request in requests:
        engine.add(request)
    return collect(engine, {request.request_id: len(request.output) for request in requests}, max_steps)


def collect(engine: Engine, next_index: dict[str, int], max_steps: int = 5000) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {name: [] for name in next_index}
    waiter = WorkWaiter(engine)
    for _ in range(max_steps):
        if not waiter.wait():
            return tokens
        result = engine.step()
        assert not result.failed, result.failed
        for out in result.tokens:
            assert out.index == next_index[out.request_id] + len(tokens[out.request_id])
            tokens[out.request_id].append(out.token_id)
    raise AssertionError(f"still work after {max_steps} steps")


def hand_off(source: Engine, target: Engine, request: EngineRequest, max_steps: int = 5000) -> list[int]:
    """Prefills on one engine, moves every block byte by byte to the other, decodes there; all tokens of the request."""
    source.add(EngineRequest(**{**_fields(request), "phase": Phase.PREFILL}))
    first = _first_token(source, max_steps)
    if first.finish is not None:
        return [first.token_id]
    rows = len(request.prompt) + len(request.output)
    blocks = source.pin(request.request_id, request.epoch)
    ticket = target.import_begin(request, rows)
    for logical in range(ticket.reused_blocks, len(ticket.block_ids)):
        for group in range(source.layout.num_groups):
            data = source.export_kv(blocks[logical], group)
            half = len(data) // 2
            target.import_kv(ticket.block_ids[logical], group, 0, data[:half])
            target.import_kv(ticket.block_ids[logical], group, half, data[half:])
    target.import_commit(request.request_id, request.epoch, (first.token_id,))
    source.unpin(request.request_id, request.epoch)
    assert source.release(request.request_id, request.epoch)
    rest = collect(target, {request.request_id: len(request.output) + 1}, max_steps)
    return [first.token_id, *rest[request.request_id]]


def _first_token(engine: Engine, max_steps: int) -> TokenOut:
    for _ in range(max_steps):
        result = engine.step()
        assert not result.failed, result.failed
        if result.tokens:
            (token,) = result.tokens
            assert token.finish in (None, FinishReason.STOP, FinishReason.LENGTH)
            return token
    raise AssertionError(f"no token after {max_steps} steps")


def _fields(request: EngineRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in EngineRequest.__dataclass_fields__}
