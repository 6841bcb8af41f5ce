"""The decoders once more: slow, in fp64, over the whole context at once, written to be read against the papers.

No cache, no batch, no fusion: every function handles one sequence and loops where the fast path reshapes. Tests compare
the fast path with these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workers.engines.torch.config import DecoderConfig, DenseConfig, Mistral4Config
from workers.engines.torch.config_rope import RopeConfig

Tensors = Mapping[str, Tensor]


def reference_logits(config: DecoderConfig, tensors: Tensors, token_ids: Sequence[int]) -> Tensor:
    """Logits after every position, [T, vocabulary], from tensors under their names without a wrapper's prefix."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    x = wide["model.embed_tokens.weight"][list(token_ids)]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        normed = norm(x, wide[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        if isinstance(config, DenseConfig):
            x = x + dense_attention(config, wide, prefix + "self_attn.", normed, config.window_of(layer))
        else:
            x = x + latent_attention(config, wide, prefix + "self_attn.", normed)
        normed = norm(x, wide[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        if isinstance(config, Mistral4Config) and layer >= config.num_dense_layers:
            x = x + mixture(config, wide, prefix + "mlp.", normed)
        else:
            x = x + feed_forward(wide, prefix + "mlp.", normed)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return norm(x, wide["model.norm.weight"], config.rms_norm_eps) @ wide[head].T


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of one head, position by position, over all keys or the last `window`. q, k: [T, D], v: [T, V]."""
    out = []
    for position in range(q.shape[0]):
        first = 0 if window is None else max(0, position + 1 - window)
        scores = (k[first : position + 1] @ q[position]) * scale
        out.append(torch.softmax(scores, 0) @ v[first : position + 1])
    return torch.stack(out)


def dense_attention(config: DenseConfig, tensors: Tensors, prefix: str, x: Tensor, window: int | None) -> Tensor:
    """Grouped-query attention: query head i reads KV head i // group."""
    dim, group = config.head_dim, config.num_heads // config.num_kv_heads
    q, k, v = (x @ tensors[f"{prefix}{name}_proj.weight"].T for name in "qkv")
    growth = query_growth(config, x)
    out = []
    for head in range(config.num_heads):
        kv_head = head // group
        out.append(
            attention(
                rotate(config.rope, q[:, head * dim : (head + 1) * dim]) * growth,
                rotate(config.rope, k[:, kv_head * dim : (kv_head + 1) * dim]),
                v[:, kv_head * dim : (kv_head + 1) * dim],
                1 / math.sqrt(dim),
                window,
            )
        )
    return torch.cat(out, dim=1) @ tensors[prefix + "o_proj.weight"].T


def query_growth(config: DecoderConfig, x: Tensor) -> Tensor:
    """The factor of the queries at each position, [T, 1]."""
    steps = [position // config.query_scale_positions for position in range(len(x))]
    return torch.tensor([[1 + config.query_scale_beta * math.log(1 + step)] for step in steps], dtype=x.dtype)


def latent_attention(config: Mistral4Config, tensors: Tensors, prefix: str, x: Tensor) -> Tensor:
    """MLA with the keys and values of each head written out."""
    nope, rank, width = config.qk_nope_head_dim, config.kv_lora_rank, config.qk_head_dim
    if config.q_lora_rank is None:
        q = x @ tensors[prefix + "q_proj.weight"].T
    else:
        q_latent = norm(x @ tensors[prefix + "q_a_proj.weight"].T, tensors[prefix + "q_a_layernorm.weight"], 1e-6)
        q = q_latent @ tensors[prefix + "q_b_proj.weight"].T
    down = x @ tensors[prefix + "kv_a_proj_with_mqa.weight"].T
    latent = norm(down[:, :rank], tensors[prefix + "kv_a_layernorm.weight"], 1e-6)
    shared_key = rotate(config.rope, down[:, rank:])
    up = latent @ tensors[prefix + "kv_b_proj.weight"].T
    growth = query_growth(config, x)
    out = []
    for head in range(config.num_heads):
        q_head = q[:, head * width : (head + 1) * width]
        q_head = torch.cat((q_head[:, :nope], rotate(config.rope, q_head[:, nope:])), dim=1) * growth
        up_head = up[:, head * (nope + config.v_head_dim) : (head + 1) * (nope + config.v_head_dim)]
        k_head = torch.cat((up_head[:, :nope], shared_key), dim=1)
        out.append(attention(q_head, k_head, up_head[:, nope:], 1 / math.sqrt(width)))
    return torch.cat(out, dim=1) @ tensors[prefix + "o_proj.weight"].T


def feed_forward(tensors: Tensors, prefix: str, x: Tensor) -> Tensor:
    """Gated SiLU."""
    gate = x @ tensors[prefix + "gate_proj.weight"].T
    up = x @ tensors[prefix + "up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ tensors[prefix + "down_proj.weight"].T


def mixture(config: Mistral4Config, tensors: Tensors, prefix: str, x: Tensor) -> Tensor:
    """Row by row: the shared expert, and each chosen expert in turn."""
    gate_up, down = tensors[prefix + "experts.gate_up_proj"], tensors[prefix + "experts.down_proj"]
    out = feed_forward(tensors, prefix + "shared_experts.", x)
    for row in range(len(x)):
        scores = torch.softmax(tensors[prefix + "gate.weight"] @ x[row], 0)
        allowed = experts_of_best_groups(config, [float(score) for score in scores])
        chosen = sorted(allowed, key=lambda expert: -float(scores[expert]))[: config.num_experts_per_token]
        total = sum(float(scores[expert]) for expert in chosen) if config.norm_topk_prob else 1.0
        for expert in chosen:
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            share = float(scores[expert]) / total * config.routed_scaling_factor
            out[row] += share * (down[expert] @ (gate * torch.sigmoid(gate) * up))
    return out


def experts_of_best_groups(config: Mistral4Config, scores: Sequence[float]) -> list[int]:
    """The experts of the groups whose two best scores have the greatest sums."""
    size = len(scores) // config.num_expert_groups
    groups = [list(range(first, first + size)) for first in range(0, len(scores), size)]
    best = sorted(groups, key=lambda group: -sum(sorted(scores[expert] for expert in group)[-2:]))
    return [expert for group in best[: config.num_groups_per_token] for expert in group]


def rotate(config: RopeConfig, x: Tensor) -> Tensor:
    """Turns pair j at position p by p * frequency_j. x: [T, dim]."""
    out = torch.empty_like(x)
    half = config.dim // 2
    for pair, frequency in enumerate(frequencies(config)):
        first, second = (2 * pair, 2 * pair + 1) if config.interleaved else (pair, pair + half)
        angle = torch.arange(x.shape[0], dtype=x.dtype) * frequency
        cos, sin = torch.cos(angle) * config.table_factor, torch.sin(angle) * config.table_factor
        out[:, first] = x[:, first] * cos - x[:, second] * sin
        out[:, second] = x[:, second] * cos + x[:, first] * sin
    return out


def frequencies(config: RopeConfig) -> list[float]:
    """The angular frequency of every pair."""
    plain = [config.theta ** (-2 * pair / config.dim) for pair in range(config.dim // 2)]
    if config.kind == "yarn":
        return [_yarn(config, pair, frequency) for pair, frequency in enumerate(plain)]
    if config.kind == "llama3":
        return [_llama3(config, frequency) for frequency in plain]
    return [frequency / config.factor for frequency in plain]


def _yarn(config: RopeConfig, pair: int, frequency: float) -> float:
    """Pairs that turn often over the original context keep their frequency, slow ones are divided by the factor."""

    def pair_that_turns(times: float) -> float:
        return config.dim * math.log(config.original_positions / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    slow_share = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
    return frequency * (1 - slow_share) + frequency / config.factor * slow_share


def _llama3(config: RopeConfig, frequency: float) -> float:
    """Short waves keep their frequency, long ones are divided by the factor, those between are blended."""
    wavelength = 2 * math.pi / frequency
    if wavelength < config.original_positions / config.high_freq_factor:
        return frequency
    if wavelength > config.original_positions / config.low_freq_factor:
        return frequency / config.factor
    kept = (config.original_positions / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    return frequency * kept + frequency / config.factor * (1 - kept)
