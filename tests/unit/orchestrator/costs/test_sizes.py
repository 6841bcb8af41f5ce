"""Counts of models against what was published of them."""

from __future__ import annotations

import pytest

from configs.catalog.loader import model_named, models
from configs.schema.model_description import ModelDescription
from orchestrator.costs import flops, sizes

ALL = list(models().values())
EXACT = {
    "deepseek-v3",
    "gpt-oss-120b",
    "kimi-k2",
    "kimi-k2.5",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "mistral-small-3.2",
    "mistral-small-4",
    "qwen3-30b-a3b",
    "qwen3-32b",
    "qwen3-235b-a22b",
}


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.name)
def test_the_total_is_the_published_one(model: ModelDescription) -> None:
    assert model.published is not None
    counts = sizes.count(model)
    counted = counts.total if model.published.counts == "all" else counts.text
    allowed = 0.0 if model.name in EXACT else model.published.tolerance
    assert counted == pytest.approx(model.published.total, rel=allowed, abs=0)


@pytest.mark.parametrize("model", [model for model in ALL if model.published and model.published.active], ids=lambda m: m.name)
def test_the_active_parameters_are_near_the_published_figure(model: ModelDescription) -> None:
    published = model.published
    assert published is not None and published.active is not None
    counts = sizes.count(model)
    extra = {"with_head": 0, "with_both": counts.embedding, "without_embeddings": -counts.head}[published.active_counts]
    assert sizes.active(model) + extra == pytest.approx(published.active, rel=published.active_tolerance)


def test_dense_models_are_active_whole() -> None:
    for name in ("llama-3.1-8b", "qwen3-32b"):
        model = model_named(name)
        counts = sizes.count(model)
        assert sizes.active(model) == counts.total - counts.embedding


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("mistral-small-4", 23_040),
        ("mistral-small-3.2", 163_840),
        ("deepseek-v3", 70_272),
        ("gpt-oss-120b", 36_864),
        ("qwen3.5-122b-a10b", 24_576),
        ("nemotron-3-super", 8_192),
        ("llama-3.1-70b", 327_680),
    ],
)
def test_cache_bytes_of_a_token(name: str, bytes_per_token: int) -> None:
    model = model_named(name)
    assert sizes.kv_bytes_per_token(model) == bytes_per_token
    assert sizes.kv_bytes_per_token(model, "fp8") == bytes_per_token // 2


def test_a_window_bounds_what_its_blocks_keep() -> None:
    model = model_named("gpt-oss-120b")
    assert sizes.kv_bytes(model, 100) == 73_728 * 100
    assert sizes.kv_bytes(model, 10_000) == 36_864 * 10_000 + 36_864 * 128


def test_states_do_not_depend_on_the_context() -> None:
    nemotron = model_named("nemotron-3-super")
    recurrent = 40 * 128 * 64 * 128
    assert sizes.state_bytes(nemotron) == 4 * (recurrent + 40 * (128 * 64 + 2 * 8 * 128) * 3)
    assert sizes.state_bytes(model_named("llama-3.1-8b")) == 0


@pytest.mark.parametrize(
    ("name", "weights", "gigabytes"),
    [
        ("mistral-small-4", "fp8", 120.9),  # one copy of the published checkpoint
        ("mistral-small-4", "nvfp4", 70.80),  # the published NVFP4 checkpoint
        ("gpt-oss-120b", "mxfp4", 65.28),  # 60.8 GiB, model card
        ("llama-3.1-8b", "bf16", 16.06),
    ],
)
def test_weight_bytes_of_published_checkpoints(name: str, weights: str, gigabytes: float) -> None:
    assert sizes.weight_bytes(model_named(name), weights) / 1e9 == pytest.approx(gigabytes, rel=0.002)  # type: ignore[arg-type]


def test_flops_of_mistral_small_4() -> None:
    model = model_named("mistral-small-4")
    one = flops.decode_flops(model, 1) - flops.head_flops(model)
    assert one / 2e9 == pytest.approx(5.56, rel=0.01), "active parameters without embedding and head"
    attention = flops.decode_flops(model, 10_001) - flops.decode_flops(model, 1)
    assert attention == 36 * 36_864 * 10_000, "absorbed: 32 heads x (320 + 256) x 2 for a context token and layer"


def test_prefill_is_linear_layers_and_causal_pairs() -> None:
    model = model_named("llama-3.1-8b")
    pairs = sum(range(101, 301))
    per_pair = 4 * 32 * 32 * 128
    expected = 200 * flops.linear_flops_per_token(model) + flops.head_flops(model) + pairs * per_pair
    assert flops.prefill_flops(model, 200, cached_tokens=100) == pytest.approx(expected, rel=1e-12)
