"""Floating-point operations that a model itself needs, whatever it runs on: the numerator of every fraction of a peak."""

from __future__ import annotations

from configs.schema.model_description import ModelDescription, MoeFfn
from orchestrator.costs import sizes
from orchestrator.costs.batch import Chunk
from orchestrator.costs.layout import Layout
from orchestrator.costs.shape import UNLIMITED, attends, attention_of, state_flops


def linear_flops_per_token(model: ModelDescription) -> float:
    """Products with weights for one token, without the head."""
    counts = sizes.count(model)
    idle = sum(
        blocks.count * (blocks.ffn.experts - blocks.ffn.picks) * sizes.expert_matrices(blocks.ffn, model.hidden)
        for blocks in model.blocks
        if isinstance(blocks.ffn, MoeFfn)
    )
    matrices = counts.mixers + counts.dense_ffn + counts.routed_experts + counts.shared_experts + counts.routers
    return 2.0 * (matrices - idle)


def head_flops(model: ModelDescription) -> float:
    """The product that gives one row of logits."""
    return 2.0 * model.hidden * model.vocab


def prefill_flops(model: ModelDescription, new_tokens: int, cached_tokens: int = 0) -> float:
    """A prompt of `new_tokens` after `cached_tokens` whose last token is sampled."""
    found = new_tokens * linear_flops_per_token(model) + head_flops(model) + new_tokens * _states(model)
    prompt = Chunk(sequences=1.0, new=float(new_tokens), cached=float(cached_tokens))
    for blocks in model.blocks:
        if attends(blocks):
            one = attention_of(blocks, Layout())
            found += float(one.prefill_flops_per_pair) * float(prompt.pairs(one.limit_tokens))
            found += float(one.index_flops_per_pair) * float(prompt.pairs(UNLIMITED))
    return found


def decode_flops(model: ModelDescription, context_tokens: int) -> float:
    """One token with `context_tokens` before and including it; latent attention multiplies with the latent rows."""
    found = linear_flops_per_token(model) + head_flops(model) + _states(model)
    for blocks in model.blocks:
        if attends(blocks):
            one = attention_of(blocks, Layout())
            found += float(one.decode_flops_per_pair) * min(context_tokens, float(one.limit_tokens))
            found += float(one.index_flops_per_pair) * context_tokens
    return found


def _states(model: ModelDescription) -> float:
    return sum(blocks.count * state_flops(blocks) for blocks in model.blocks)
