"""The fast path against its slow twin: layer by layer, then whole models, on seeded random input."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.torch_models import LogitsProbe, a_runner, feed, random_tokens, tensors_of
from workers.engines.torch import reference
from workers.engines.torch.config import Mistral4Config, parse_config, read_config
from workers.engines.torch.config_rope import RopeConfig
from workers.engines.torch.layers.experts import PlainExperts
from workers.engines.torch.layers.linear import PlainLinear
from workers.engines.torch.layers.mlp import MlpWeights
from workers.engines.torch.layers.moe import MoeRule, MoeWeights, moe
from workers.engines.torch.layers.rope import inverse_frequencies, query_scale, rope_tables, rotate
from workers.engines.torch.tiny import random_tensors, write_tiny

ROPES = [
    RopeConfig(kind="default", dim=32, theta=10_000.0, interleaved=False),
    RopeConfig(kind="default", dim=32, theta=10_000.0, interleaved=True),
    RopeConfig(kind="yarn", dim=64, theta=10_000.0, interleaved=True, factor=128.0, original_positions=8192),
    RopeConfig(kind="yarn", dim=16, theta=10_000.0, interleaved=False, factor=4.0, original_positions=32, truncate=False),
    RopeConfig(kind="llama3", dim=64, theta=500_000.0, interleaved=False, factor=8.0, original_positions=8192),
]


@pytest.mark.parametrize("config", ROPES, ids=lambda config: f"{config.kind}-{config.dim}-{config.interleaved}")
def test_rotation(config: RopeConfig) -> None:
    expected = torch.tensor(reference.frequencies(config), dtype=torch.float64)
    torch.testing.assert_close(inverse_frequencies(config).double(), expected, rtol=1e-6, atol=0)
    x = torch.randn(50, 3, config.dim, generator=torch.Generator().manual_seed(0))
    tables = rope_tables(config, inverse_frequencies(config), torch.arange(50), torch.float32)
    turned = rotate(x, tables)
    for head in range(3):
        torch.testing.assert_close(turned[:, head].double(), reference.rotate(config, x[:, head].double()), atol=2e-5, rtol=0)


def test_published_yarn_frequencies() -> None:
    """The released model's table, as transformers computes it."""
    published = {
        0: 1.0,
        1: 0.749894,
        12: 0.0316228,
        13: 0.0219039,
        16: 0.00694712,
        24: 8.41346e-5,
        25: 5.8585e-6,
        31: 1.0418e-6,
    }
    table = inverse_frequencies(ROPES[2]).tolist()
    for pair, frequency in published.items():
        assert table[pair] == pytest.approx(frequency, rel=1e-4)


def test_published_query_scale() -> None:
    positions = torch.tensor([0, 8191, 8192, 16384, 65536, 131072, 262143, 1048575])
    scale = query_scale(positions, 0.1, 8192, torch.float32)
    assert scale is not None
    expected = [1.0, 1.0, 1.0693, 1.1099, 1.2197, 1.2833, 1.3466, 1.4852]
    assert scale.flatten().tolist() == pytest.approx(expected, abs=5e-5)
    assert query_scale(positions, 0.0, 8192, torch.float32) is None


def mistral4_part(**dims: Any) -> tuple[Mistral4Config, dict[str, torch.Tensor]]:
    from workers.engines.torch.tiny import _configuration

    config = parse_config(_configuration("mistral-small-4", {"num_hidden_layers": 1, **dims}))
    assert isinstance(config, Mistral4Config)
    return config, random_tensors(config, 9)


@pytest.mark.parametrize(("experts", "per_token", "renormalise"), [(8, 4, True), (8, 1, True), (5, 5, True), (16, 2, False)])
def test_experts_sorted_against_experts_in_a_loop(experts: int, per_token: int, renormalise: bool) -> None:
    dims = {"n_routed_experts": experts, "num_experts_per_tok": per_token, "norm_topk_prob": renormalise}
    config, tensors = mistral4_part(**dims, routed_scaling_factor=1.5)
    prefix = "model.layers.0.mlp."
    gate, up, down = (tensors[f"{prefix}shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
    weights = MoeWeights(
        router=tensors[prefix + "gate.weight"],
        experts=PlainExperts(tensors[prefix + "experts.gate_up_proj"], tensors[prefix + "experts.down_proj"]),
        shared=MlpWeights(PlainLinear(torch.cat((gate, up))), PlainLinear(down)),
    )
    x = torch.randn(37, config.hidden_size, generator=torch.Generator().manual_seed(1))
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    expected = reference.mixture(config, wide, prefix, x.double())
    rule = MoeRule(per_token, renormalise, 1.5)
    torch.testing.assert_close(moe(x, weights, rule).double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(moe(x[11:12], weights, rule).double(), expected[11:12], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 32, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}}),
        ("mistral", {"num_hidden_layers": 1}),
        ("mistral", {"sliding_window": 21}),
        ("ministral", {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("mistral-small-4", {}),
        ("mistral-small-4", {"first_k_dense_replace": 2, "n_shared_experts": 2, "v_head_dim": 24}),
        ("mistral-small-4", {"rope_interleave": False, "norm_topk_prob": False, "num_experts_per_tok": 2}),
        ("mistral-small-4", {"tie_word_embeddings": True, "routed_scaling_factor": 2.5, "kv_lora_rank": 40}),
    ],
)  # fmt: skip
def test_whole_models(kind: str, dims: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny(kind, tmp_path / "model", 5, **dims)
    rng = random.Random(str(dims))
    tokens = random_tokens(6, 110)
    expected = reference.reference_logits(read_config(folder), tensors_of(folder), tokens)
    runner = a_runner(folder, block_tokens=rng.choice((1, 3, 16)), num_blocks=128)
    probe = LogitsProbe(runner)
    cuts = sorted(rng.sample(range(1, 110), 8))
    feed(runner, tokens, cuts, tuple(rng.sample(range(128), -(-110 // runner.layout.block_tokens))))
    for end, logits in zip([*cuts, 110], probe.seen, strict=True):
        torch.testing.assert_close(logits[0].double(), expected[end - 1], atol=1e-4, rtol=0)
