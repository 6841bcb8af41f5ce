"""Decode steps in padded static buffers, experts as grouped products, and a step in which the host never waits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.torch_models import a_runner, a_slice, random_tokens
from workers.engines.torch.attention.torch_backend import TorchAttention
from workers.engines.torch.config import read_config
from workers.engines.torch.forward_batch import GROUP_ROWS, ForwardBatch, build_batch
from workers.engines.torch.graphs import MAX_BATCH, MAX_GRAPHS, Bucket, GraphedSteps, bucket_of
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.experts import PlainExperts
from workers.engines.torch.layers.grouped_experts import GroupedExperts
from workers.engines.torch.models.decoder import Decoder
from workers.engines.torch.models.dense import DenseDecoder
from workers.engines.torch.models.expert_forms import with_experts
from workers.engines.torch.models.mistral4 import Mistral4Decoder
from workers.engines.torch.native.decoder import NativeDecoder
from workers.engines.torch.runner import TorchRunner
from workers.engines.torch.steps import EagerSteps

# The native kernels, where there are any, share their work among threads.
pytestmark = pytest.mark.usefixtures("two_threads")

CPU = torch.device("cpu")


def test_buckets_hold_their_rows_and_are_few() -> None:
    assert bucket_of([5], 64) == Bucket(1, 4)
    assert bucket_of([64 * 4 + 1, 3, 9], 64) == Bucket(4, 8)
    assert bucket_of([1000] * 9, 64) == Bucket(16, 16)
    assert bucket_of([10] * (MAX_BATCH + 1), 64) is None
    assert bucket_of([], 64) is None
    assert bucket_of([100_000, *[10] * 31], 64) is None  # a rectangle of padding
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        lengths = [rng.randint(1, rng.choice((100, 5000))) for _ in range(rng.randint(1, MAX_BATCH))]
        bucket = bucket_of(lengths, 64)
        if bucket is not None:
            seen.add(bucket)
            assert bucket.batch >= len(lengths)
            assert bucket.blocks * 64 >= max(lengths)
            rows = bucket.batch * bucket.blocks * 64
            assert rows <= max(GROUP_ROWS, 3 * sum(lengths))
    assert {bucket.batch for bucket in seen} <= {1, 2, 4, *range(8, MAX_BATCH + 1, 8)}
    assert {bucket.blocks for bucket in seen} <= {4, 8, 16, 32, 64, 128}


@pytest.fixture(params=["tiny_llama", "tiny_mistral4"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def prefilled(runner: TorchRunner, lengths: list[int], rng: random.Random) -> list[Any]:
    """Sequences in a pool of NaN, and the decode slices that come next; padding must neither read nor write there."""
    runner._cache.blocks[: runner.num_blocks] = torch.nan
    free = rng.sample(range(runner.num_blocks), runner.num_blocks)
    slices = []
    for length in lengths:
        tokens = random_tokens(length, length)
        table = tuple(free.pop() for _ in range(-(-length // 16)))
        if length > 1:
            runner.run([a_slice(tokens, 0, length - 1, table, sample=False)])
        slices.append(a_slice(tokens, length - 1, 1, table))
    return slices


@pytest.mark.parametrize("lengths", [[1], [40], [17, 300, 16], [33] * 5, [1, 2, 3, 100, 5, 6, 64, 80, 9]])
def test_static_buffers_against_the_eager_step(folder: Path, lengths: list[int]) -> None:
    runners = [a_runner(folder, num_blocks=64) for _ in range(2)]
    eager, graphed = EagerSteps(), GraphedSteps()
    found = []
    with torch.inference_mode():
        for runner, steps in zip(runners, (eager, graphed), strict=True):
            slices = prefilled(runner, lengths, random.Random(1))
            found.append(steps.logits(runner._decoder, slices, runner._cache, CPU).clone())
            if len(slices) > 1:
                less = [slices[0], a_slice(slices[1].tokens, slices[1].start, 1, slices[1].block_table, sample=False)]
                assert steps.logits(runner._decoder, less, runner._cache, CPU).shape[0] == 1
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)
    pools = [runner._cache.blocks[: runner.num_blocks] for runner in runners]
    torch.testing.assert_close(pools[1], pools[0], atol=1e-4, rtol=0, equal_nan=True)
    assert not runners[1]._cache.blocks[runners[1].num_blocks].any()  # the block of zeros


def test_steps_with_chunks_are_eager_and_passes_are_bounded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, steps = a_runner(tiny_llama, num_blocks=64), GraphedSteps()
    tokens = random_tokens(1, 30)
    with torch.inference_mode():
        assert steps.logits(runner._decoder, [a_slice(tokens, 0, 30, (1, 2))], runner._cache, CPU).shape == (1, 272)
        assert not steps._passes
        for batch in (1, 2, 3, 5, 9):
            steps.logits(runner._decoder, [a_slice(tokens, 29, 1, (1, 2))] * batch, runner._cache, CPU)
        assert [bucket.batch for bucket in steps._passes] == [1, 2, 4, 8, 16]
        monkeypatch.setattr("workers.engines.torch.graphs.MAX_GRAPHS", 5)
        steps.logits(runner._decoder, [a_slice(tokens, 29, 1, (1, 2))] * 2, runner._cache, CPU)
        steps.logits(runner._decoder, [a_slice(tokens, 29, 1, (1, 2))] * 17, runner._cache, CPU)
    assert [bucket.batch for bucket in steps._passes] == [4, 8, 16, 2, 24]
    assert MAX_GRAPHS == 64


@pytest.mark.parametrize(("first", "count"), [(0, 6), (2, 3), (5, 1), (0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_against_the_loop(first: int, count: int, dtype: torch.dtype) -> None:
    """All experts, and runs of them as ranks hold; experts that nobody chose among them."""
    generator = torch.Generator().manual_seed(first)
    gate_up = (torch.randn(count, 32, 16, generator=generator) * 0.2).to(dtype)
    down = (torch.randn(count, 16, 16, generator=generator) * 0.2).to(dtype)
    for rows in (1, 2, 23):
        x = torch.randn(rows, 16, generator=generator).to(dtype)
        scores = torch.rand(rows, 6, generator=generator)
        scores[:, 4] = 0
        weights, chosen = scores.topk(3, dim=-1)
        expected = PlainExperts(gate_up, down, first)(x, chosen, weights)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(GroupedExperts(gate_up, down, first)(x, chosen, weights), expected, atol=tolerance, rtol=0)


def test_only_plain_bf16_experts_have_a_grouped_form() -> None:
    narrow = PlainExperts(torch.zeros(2, 4, 2, dtype=torch.bfloat16), torch.zeros(2, 2, 2, dtype=torch.bfloat16), 3)
    wide = PlainExperts(torch.zeros(2, 4, 2), torch.zeros(2, 2, 2))
    grouped = GroupedExperts.of(narrow)
    assert isinstance(grouped, GroupedExperts)
    assert (grouped.first, grouped.count) == (3, 2)
    assert GroupedExperts.of(wide) is wide
    assert GroupedExperts.of(grouped) is grouped


class Waits(TorchDispatchMode):
    """Fails at operators whose result the host must read before it can go on."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name.startswith(one) for one in self.FORBIDDEN), f"the host waits for {name}"
        return func(*args, **(kwargs or {}))


def forward_without_waits(
    decoder: Decoder, batch: ForwardBatch, cache: KvCache, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the host reads a tensor inside a step")

    with monkeypatch.context() as patch, Waits():
        for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        return decoder.forward(batch, cache)


def a_gpu_like_decoder(runner: TorchRunner, folder: Path) -> Decoder:
    """The decoder as it is put together for a GPU: attention through torch, grouped experts."""
    decoder: Any = runner._decoder
    if isinstance(decoder, NativeDecoder):
        decoder = runner._decoder = decoder._torch
    config: Any = read_config(folder)
    if isinstance(decoder, DenseDecoder):
        return DenseDecoder(config, decoder._weights, TorchAttention(), decoder._ranks)
    assert isinstance(decoder, Mistral4Decoder)
    weights = with_experts(decoder._weights, GroupedExperts.of)
    return Mistral4Decoder(config, weights, TorchAttention(), decoder._ranks)


@pytest.mark.parametrize("static", [True, False], ids=["graphed", "eager"])
def test_the_host_never_waits_inside_a_decode_step(folder: Path, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the upload of the batch and the sampling."""
    runner = a_runner(folder, "bfloat16", num_blocks=64)
    decoder = a_gpu_like_decoder(runner, folder)
    with torch.inference_mode():
        slices = prefilled(runner, [3, 40, 17, 290], random.Random(2))
        expected = EagerSteps().logits(runner._decoder, slices, runner._cache, CPU)
        if static:
            steps = GraphedSteps()
            steps.logits(decoder, slices, runner._cache, CPU)
            (one,) = steps._passes.values()
            batch = one._static.batch
        else:
            batch = build_batch(slices, runner._cache, CPU)
        found = forward_without_waits(decoder, batch, runner._cache, monkeypatch)
    torch.testing.assert_close(found[:4], expected, atol=0.1, rtol=0.1)


def test_the_host_does_not_wait_in_a_prefill_either(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = a_runner(folder, "bfloat16", num_blocks=64)
    decoder = a_gpu_like_decoder(runner, folder)
    tokens = random_tokens(1, 200)
    with torch.inference_mode():
        runner.run([a_slice(tokens, 0, 120, tuple(range(13)), sample=False)])
        batch = build_batch([a_slice(tokens, 120, 80, tuple(range(13)))], runner._cache, CPU)
        assert forward_without_waits(decoder, batch, runner._cache, monkeypatch).shape == (1, 272)


def test_the_counter_counts(tiny_mistral4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop over experts reads the router's counts, and is caught."""
    runner = a_runner(tiny_mistral4, num_blocks=64)
    batch = build_batch([a_slice(random_tokens(1, 8), 0, 8, (1,))], runner._cache, CPU)
    decoder: Any = runner._decoder
    plain = Mistral4Decoder(
        read_config(tiny_mistral4),
        decoder._weights,
        TorchAttention(),
        decoder._ranks,  # type: ignore[arg-type]
    )
    with torch.inference_mode(), pytest.raises(AssertionError, match="the host"):
        forward_without_waits(plain, batch, runner._cache, monkeypatch)
