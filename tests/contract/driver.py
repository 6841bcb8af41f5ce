"""Runs requests on engines the way a worker does, and keeps what came out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from workers.engine_api.protocol import Engine
from workers.engine_api.types import (
    EngineRequest,
    Failed,
    FinishReason,
    ImportTicket,
    Phase,
    PrefillProgress,
    SamplingParams,
    StepResult,
)
from workers.engine_api.waiting import WorkWaiter

MAX_STEPS = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """What a test asks of the engine that it gets."""

    num_blocks: int = 64
    block_tokens: int = 8
    max_batch_tokens: int = 32
    max_running: int = 8
    prefix_cache: bool = True


class EngineFactory(Protocol):
    """Makes engines of one model; every call gives a new, empty one."""

    def __call__(self, shape: EngineShape) -> Engine: ...


Expected = Callable[[tuple[int, ...], SamplingParams], list[int]]


@dataclass
class Output:
    """Everything that steps reported of one request."""

    tokens: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    progress: list[PrefillProgress] = field(default_factory=list)
    failed: Failed | None = None


class Outputs(dict[str, Output]):
    """Outputs by request id."""

    def take(self, result: StepResult) -> None:
        for token in result.tokens:
            output = self[token.request_id]
            assert output.finish is None, f"{token.request_id}: a token after the last one"
            output.tokens.append(token.token_id)
            output.indexes.append(token.index)
            output.finish = token.finish
        for progress in result.progress:
            self[progress.request_id].progress.append(progress)
        for failed in result.failed:
            self[failed.request_id].failed = failed

    def __missing__(self, request_id: str) -> Output:
        return self.setdefault(request_id, Output())


def run(engine: Engine, requests: Iterable[EngineRequest] = (), *, steps: int | None = None) -> Outputs:
    """Adds the requests and steps until nothing is left to run, or at most `steps` times. Checks integrity on the way."""
    outputs, waiter = Outputs(), WorkWaiter(engine)
    for request in requests:
        engine.add(request)
    for _ in range(MAX_STEPS if steps is None else steps):
        if not waiter.wait():
            assert engine.step() == StepResult(), "an engine without work ran something"
            return outputs
        result = engine.step()
        assert result != StepResult(), "has_work promised work, the step ran none"
        outputs.take(result)
        engine.check_integrity()
    assert steps is not None, f"still working after {MAX_STEPS} steps"
    return outputs


def a_prompt(engine: Engine, length: int, seed: int = 0) -> tuple[int, ...]:
    """`length` random token ids without the special ones at the start of the vocabulary."""
    rng = random.Random(f"{seed}/{length}")
    return tuple(rng.randrange(3, engine.identity.vocab_size) for _ in range(length))


def a_request(
    request_id: str,
    prompt: tuple[int, ...],
    *,
    max_tokens: int = 8,
    epoch: int = 1,
    phase: Phase = Phase.FULL,
    output: tuple[int, ...] = (),
    salt: bytes = b"",
    sampling: SamplingParams | None = None,
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        epoch=epoch,
        prompt=prompt,
        sampling=sampling or SamplingParams(max_tokens=max_tokens),
        phase=phase,
        output=output,
        cache_salt=salt,
    )


def prefill(engine: Engine, request: EngineRequest) -> Output:
    """Runs a Phase.PREFILL request until it is held."""
    assert request.phase is Phase.PREFILL
    output = run(engine, [request])[request.request_id]
    assert len(output.tokens) == 1
    return output


def copy_blocks(source: Engine, source_blocks: tuple[int, ...], target: Engine, ticket: ImportTicket) -> int:
    """Moves the bytes of all blocks that the target does not have, in small frames; returns how many blocks."""
    layout, frame_bytes = source.layout, 100
    assert layout == target.layout
    for index in range(ticket.reused_blocks, len(ticket.block_ids)):
        for group in range(layout.num_groups):
            data = source.export_kv(source_blocks[index], group)
            assert data.nbytes == layout.group_bytes(group)
            for offset in range(0, data.nbytes, frame_bytes):
                target.import_kv(ticket.block_ids[index], group, offset, data.cast("B")[offset : offset + frame_bytes])
    return len(ticket.block_ids) - ticket.reused_blocks


def hand_off(source: Engine, target: Engine, request: EngineRequest, next_token_ids: tuple[int, ...]) -> ImportTicket:
    """Moves a held sequence from one engine to the other and releases it there; the target decodes from now on."""
    rows = len(request.prompt) + len(request.output)
    blocks = source.pin(request.request_id, request.epoch)
    assert len(blocks) == -(-rows // source.layout.block_tokens)
    ticket = target.import_begin(request, rows)
    assert len(ticket.block_ids) == len(blocks)
    copy_blocks(source, blocks, target, ticket)
    target.import_commit(request.request_id, request.epoch, next_token_ids)
    source.unpin(request.request_id, request.epoch)
    assert source.release(request.request_id, request.epoch)
    return ticket


def assert_empty(engine: Engine) -> None:
    """Nothing is owned, nothing is queued, nothing leaked."""
    engine.check_integrity()
    stats = engine.stats()
    gauges = (stats.waiting, stats.running, stats.holding, stats.importing, stats.used_blocks, stats.leaked_blocks)
    assert gauges == (0, 0, 0, 0, 0, 0), stats
    assert stats.cached_blocks + stats.free_blocks == stats.total_blocks
    assert not engine.has_work()
