"""Token for token with transformers in fp32, over random tiny shapes, chunk sizes and block sizes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.torch_models import (
    LogitsProbe,
    a_runner,
    an_engine,
    feed,
    hand_off,
    random_tokens,
    run_all,
    tensors_of,
    transformers_greedy,
    transformers_twin,
)
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.torch.config import read_config
from workers.engines.torch.reference import reference_logits
from workers.engines.torch.tiny import write_tiny

GREEDY = SamplingParams(max_tokens=64)


def random_dims(kind: str, rng: random.Random) -> dict[str, Any]:
    if kind != "mistral-small-4":
        kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2, 4))
        return {
            "num_hidden_layers": rng.randint(1, 4),
            "num_attention_heads": kv_heads * group,  # must divide hidden_size in transformers
            "num_key_value_heads": kv_heads,
            "head_dim": rng.choice((8, 16, 32)),
            "hidden_size": kv_heads * group * rng.choice((8, 16)),
            "tie_word_embeddings": rng.random() < 0.5,
            "rope_theta": rng.choice((10_000.0, 1_000_000.0)),
        }
    heads, experts = rng.choice((1, 3, 4)), rng.choice((4, 8, 16))
    return {
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": rng.choice((24, 48)),
        "kv_lora_rank": rng.choice((16, 32, 48)),
        "qk_nope_head_dim": rng.choice((8, 16)),
        "qk_rope_head_dim": rng.choice((8, 16)),
        "v_head_dim": rng.choice((16, 32)),
        "n_routed_experts": experts,
        "num_experts_per_tok": rng.choice((1, 2, 4)),
        "n_shared_experts": rng.choice((1, 2)),
        "first_k_dense_replace": rng.choice((0, 1)),
    }


@pytest.mark.parametrize("kind", ["llama", "mistral", "mistral-small-4"])
@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(kind: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{kind}-{seed}")
    dims = random_dims(kind, rng)
    if kind == "mistral-small-4":
        # transformers reads the rotated share of a head from here.
        from workers.engines.torch.tiny import _MISTRAL4_TEXT

        share = dims["qk_rope_head_dim"] / (dims["qk_rope_head_dim"] + dims["qk_nope_head_dim"])
        dims["rope_parameters"] = {**_MISTRAL4_TEXT["rope_parameters"], "partial_rotary_factor": share}
    folder = write_tiny(kind, tmp_path / "model", seed, **dims)
    twin = transformers_twin(folder)
    block_tokens, chunk = rng.choice((1, 4, 16, 64)), rng.randint(5, 90)

    prompt = random_tokens(seed, 200)
    with torch.inference_mode():
        expected = twin(torch.tensor([prompt])).logits[0]
    runner = a_runner(folder, block_tokens=block_tokens, num_blocks=256)
    probe = LogitsProbe(runner)
    ends = [*range(chunk, 200, chunk), 200]
    feed(runner, prompt, ends[:-1], tuple(rng.sample(range(256), -(-200 // block_tokens))))
    for end, logits in zip(ends, probe.seen, strict=True):
        torch.testing.assert_close(logits[0], expected[end - 1], atol=1e-4, rtol=0)

    engine = an_engine(folder, block_tokens=block_tokens, num_blocks=512, max_batch_tokens=chunk)
    lengths = rng.sample(range(1, 200), 3)
    prompts = {f"r{length}": random_tokens(length, length) for length in lengths}
    tokens = run_all(engine, [EngineRequest(request_id=n, epoch=1, prompt=p, sampling=GREEDY) for n, p in prompts.items()])
    assert tokens == {name: transformers_greedy(twin, p, 64) for name, p in prompts.items()}
    assert engine.stats().used_blocks == 0


@pytest.mark.parametrize(("kind", "seed"), [("mistral", 0), ("mistral", 1), ("ministral", 2), ("ministral", 3)])
def test_windows(kind: str, seed: int, tmp_path: Path) -> None:
    """Windows across block and chunk borders, in all layers or in some."""
    rng = random.Random(f"{kind}-{seed}")
    dims = {**random_dims(kind, rng), "num_hidden_layers": 3, "sliding_window": rng.choice((1, 7, 33, 64, 150))}
    if kind == "ministral":
        dims["layer_types"] = rng.sample(["full_attention", "sliding_attention", "sliding_attention"], 3)
    folder = write_tiny(kind, tmp_path / "model", seed, **dims)
    twin = transformers_twin(folder)
    engine = an_engine(folder, block_tokens=rng.choice((1, 4, 16)), num_blocks=1024, max_batch_tokens=rng.randint(5, 90))
    prompts = {f"r{length}": random_tokens(length, length) for length in (*rng.sample(range(1, 200), 2), 200)}
    tokens = run_all(engine, [EngineRequest(request_id=n, epoch=1, prompt=p, sampling=GREEDY) for n, p in prompts.items()])
    assert tokens == {name: transformers_greedy(twin, p, 64) for name, p in prompts.items()}


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64}
SHARPER_YARN = {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
RELATIVES: list[tuple[str, dict[str, Any]]] = [
    ("ministral3", {}),
    ("ministral3", {"head_dim": 32, "sliding_window": 40}),
    ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}, "tie_word_embeddings": True}),
    ("llama", {"head_dim": None, "rope_parameters": YARN}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    ("mistral", {"head_dim": None, "num_key_value_heads": 6}),
    ("mistral", {"rope_parameters": SHARPER_YARN}),
    ("mistral-small-4", {"q_lora_rank": None}),
    ("mistral-small-4", {"q_lora_rank": None, "first_k_dense_replace": 1, "rope_interleave": False}),
    ("mistral-small-4", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
    ("mistral-small-4", {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5}),
]


@pytest.mark.parametrize(("kind", "dims"), RELATIVES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_published_relatives(kind: str, dims: dict[str, Any], tmp_path: Path) -> None:
    """Shapes that one key sets apart, beyond their original positions and over several query scale steps."""
    folder = write_tiny(kind, tmp_path / "model", 5, **dims)
    twin = transformers_twin(folder)
    prompt = random_tokens(3, 200)
    with torch.inference_mode():
        expected = twin(torch.tensor([prompt])).logits[0]
    runner = a_runner(folder)
    probe = LogitsProbe(runner)
    feed(runner, prompt, [70, 131], tuple(range(13)))
    for end, logits in zip((70, 131, 200), probe.seen, strict=True):
        torch.testing.assert_close(logits[0], expected[end - 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        reference_logits(read_config(folder), tensors_of(folder), prompt[:80])[-1].float(), expected[79], atol=2e-4, rtol=0
    )
    request = EngineRequest(request_id="r", epoch=1, prompt=prompt[:90], sampling=GREEDY)
    assert run_all(an_engine(folder), [request]) == {"r": transformers_greedy(twin, prompt[:90], 64)}


@pytest.mark.parametrize("kind", ["llama", "mistral-small-4"])
def test_disaggregated_across_many_query_scale_steps(kind: str, tmp_path: Path) -> None:
    """Positions up to 664 of a model whose query scale grows every 32, handed over between two engines."""
    folder = write_tiny(kind, tmp_path / "model", 8)
    twin = transformers_twin(folder)
    source = an_engine(folder, num_blocks=64, max_batch_tokens=150)
    target = an_engine(folder, num_blocks=64)
    for length in (1, 15, 16, 17, 333, 600):
        request = EngineRequest(request_id=f"r{length}", epoch=1, prompt=random_tokens(length, length), sampling=GREEDY)
        assert hand_off(source, target, request) == transformers_greedy(twin, request.prompt, 64)
    assert source.stats().prefill_chunks >= 6 + 2 + 3
    assert (source.stats().used_blocks, target.stats().used_blocks) == (0, 0)
