"""The Mistral Small 4 shape as a program."""

from __future__ import annotations

import torch
from torch import Tensor, bfloat16, float32

from workers.engines.torch.config import Mistral4Config
from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.experts import PlainExperts
from workers.engines.torch.layers.linear import PlainLinear
from workers.engines.torch.layers.mlp import MlpWeights
from workers.engines.torch.layers.moe import MoeWeights
from workers.engines.torch.layers.rope import inverse_frequencies
from workers.engines.torch.models.mistral4_weights import LatentAttention, Mistral4Layer, Mistral4Weights
from workers.engines.torch.native.library import Library
from workers.engines.torch.native.passes import Passes
from workers.engines.torch.native.pieces import ADDED, BF16, F32, add_linear, add_mlp, add_norm, is_supported
from workers.engines.torch.native.prefill import FlashPrefill
from workers.engines.torch.native.program import Code, Program

_LATENT_NORM_EPS = 1e-6  # of the norms inside the attention; the configuration has no key for it


class Mistral4Program(Passes):
    """See Passes."""

    @classmethod
    def of(cls, config: Mistral4Config, weights: Mistral4Weights, library: Library, max_rows: int) -> Mistral4Program | None:
        """None when a weight lies in memory in a way that the native step cannot read, or a head has an odd width."""
        if config.num_groups_per_token != config.num_expert_groups:
            return None
        linears = [weights.head]
        for layer in weights.layers:
            attention, feed = layer.attention, layer.feed_forward
            shared = feed.shared if isinstance(feed, MoeWeights) else feed
            if attention.query is None:
                return None
            linears += [attention.q_kv_a, attention.query.up, attention.output, shared.gate_up, shared.down]
            if isinstance(feed, MoeWeights) and not isinstance(feed.experts, PlainExperts):
                return None
        fits = FlashPrefill.fits(config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
        return cls(config, weights, library, max_rows) if fits and all(map(is_supported, linears)) else None

    def __init__(self, config: Mistral4Config, weights: Mistral4Weights, library: Library, max_rows: int) -> None:
        assert config.q_lora_rank is not None
        super().__init__(library, max_rows, weights.norm, config.rms_norm_eps, weights.head)
        self._config = config
        self._weights = weights
        self._query_rank = config.q_lora_rank
        self._flash = FlashPrefill(library)
        self._inverse = inverse_frequencies(config.rope)
        buffers, heads = self._buffers, config.num_heads
        self._down = buffers.of(self._query_rank + config.kv_row_values, bfloat16)
        self._latent_q = buffers.of(self._query_rank, bfloat16)
        self._q = buffers.of(heads * config.qk_head_dim, bfloat16)
        self._absorbed = buffers.of(heads * config.kv_row_values, bfloat16)
        self._mixed = buffers.of(heads * config.kv_lora_rank, bfloat16)
        self._attended = buffers.of(heads * config.v_head_dim, bfloat16)
        self._tables = buffers.of(config.qk_rope_head_dim, float32)
        self._scores = buffers.of(config.num_experts, float32)
        self._chosen = buffers.of(config.num_experts_per_token, torch.int32)
        self._shares = buffers.of(config.num_experts_per_token, float32)
        self._inner: dict[int, tuple[Tensor, Tensor]] = {}

    def _record(self, cache: KvCache) -> Program:
        config, program = self._config, Program(self._library)
        program.add(Code.EMBED, self._x, self._weights.embedding, config.hidden_size)
        program.add(Code.ROPE_TABLES, self._tables, self._inverse, config.qk_rope_head_dim // 2)
        for index, layer in enumerate(self._weights.layers):
            self._attention(program, index, layer, cache)
            add_norm(program, self._x, layer.post_norm, self._normed, config.rms_norm_eps)
            if isinstance(layer.feed_forward, MoeWeights):
                self._experts(program, layer.feed_forward)
            else:
                self._mlp(program, layer.feed_forward)
        return program

    def _mlp(self, program: Program, weights: MlpWeights) -> None:
        width = weights.gate_up.out_features
        if width not in self._inner:
            self._inner[width] = self._buffers.of(width, bfloat16), self._buffers.of(width // 2, bfloat16)
        add_mlp(program, self._normed, weights.gate_up, weights.down, self._inner[width], self._x)

    def _experts(self, program: Program, feed: MoeWeights) -> None:
        config, held = self._config, feed.experts
        assert isinstance(held, PlainExperts)
        per_token = config.num_experts_per_token
        self._mlp(program, feed.shared)
        add_linear(program, self._normed, PlainLinear(feed.router), self._scores, F32)
        program.add(
            Code.ROUTE, self._scores, self._chosen, self._shares, config.num_experts, per_token, int(config.norm_topk_prob),
            float(config.routed_scaling_factor),
        )  # fmt: skip

        program.add(
            Code.EXPERTS, self._normed, self._chosen, self._shares, per_token, held.gate_up, held.down, held.count,
            config.hidden_size, config.moe_intermediate_size, self._x, feed.visits,
        )  # fmt: skip

    def _attention(self, program: Program, index: int, layer: Mistral4Layer, cache: KvCache) -> None:
        config, weights = self._config, layer.attention
        assert weights.query is not None
        rope, row = config.rope, config.kv_row_values
        offset = index * cache.layout.block_tokens * row
        add_norm(program, self._x, layer.input_norm, self._normed, config.rms_norm_eps)
        add_linear(program, self._normed, weights.q_kv_a, self._down, BF16)
        program.add(
            Code.SPLIT_LATENT, self._down, weights.query.norm, self._latent_q, self._query_rank, weights.kv_a_norm,
            config.kv_lora_rank, config.qk_rope_head_dim, self._tables, int(rope.interleaved), float(rope.table_factor),
            _LATENT_NORM_EPS, offset, row,
        )  # fmt: skip
        add_linear(program, self._latent_q, weights.query.up, self._q, BF16)
        self._attend(program, index, weights, cache)
        add_linear(program, self._attended, weights.output, self._x, ADDED)

    def _attend(self, program: Program, index: int, weights: LatentAttention, cache: KvCache) -> None:
        config = self._config
        heads, nope, value, rank = config.num_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
        row, dim, tokens = config.kv_row_values, config.qk_head_dim, cache.layout.block_tokens

        def absorbed(code: Code, *operands: int | float | Tensor | None) -> None:
            place = len(program)

            def wide(batch: ForwardBatch, cache: KvCache, rows: int) -> None:
                if batch.decodes is not None:
                    program.run_one(place, batch, cache, batch.decodes.count)

            program.add(code, *operands, wide=wide)

        program.add(
            Code.ROTATE_MLA, self._q, self._absorbed, self._tables, heads, nope, config.qk_rope_head_dim, rank,
            int(config.rope.interleaved), float(config.rope.table_factor), float(config.query_scale_beta),
            config.query_scale_positions,
        )  # fmt: skip
        absorbed(
            Code.HEADS_LINEAR, self._q, heads * dim, dim, weights.heads.key.transpose(1, 2).contiguous(), heads, nope, rank,
            self._absorbed, heads * row, row,
        )  # fmt: skip
        absorbed(
            Code.ATTEND, self._absorbed, self._mixed, heads, 1, row, rank, 0, 0, 0, 0, dim**-0.5, 0,
            index * tokens * row, row, config.num_layers * tokens * row, tokens, heads * row,
        )  # fmt: skip
        place = len(program)

        def wide(batch: ForwardBatch, cache: KvCache, rows: int) -> None:
            cache.stored(index)
            if batch.decodes is not None:
                program.run_one(place, batch, cache, batch.decodes.count)
            queries, out = self._q.view(-1, heads, dim), self._attended.view(-1, heads, value)
            for part in batch.prefills:
                chunk = slice(part.first, part.first + part.count)
                self._flash.mla(queries[chunk], out[chunk], index, cache, part, weights.heads.joint, rank)

        program.add(
            Code.HEADS_LINEAR, self._mixed, heads * rank, rank, weights.heads.value.contiguous(), heads, rank, value,
            self._attended, heads * value, value, wide=wide,
        )  # fmt: skip
