"""The Llama and Mistral shape as a program."""

from __future__ import annotations

from torch import bfloat16, float32

from workers.engines.torch.config import DenseConfig
from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.rope import inverse_frequencies
from workers.engines.torch.models.dense_weights import DenseLayer, DenseWeights
from workers.engines.torch.native.library import Library
from workers.engines.torch.native.passes import Passes
from workers.engines.torch.native.pieces import ADDED, BF16, add_linear, add_mlp, add_norm, is_supported
from workers.engines.torch.native.prefill import FlashPrefill
from workers.engines.torch.native.program import Code, Program


class DenseProgram(Passes):
    """See Passes."""

    @classmethod
    def of(cls, config: DenseConfig, weights: DenseWeights, library: Library, max_rows: int) -> DenseProgram | None:
        """None when a weight lies in memory in a way that the native step cannot read, or a head has an odd width."""
        linears = [weights.head]
        for layer in weights.layers:
            linears += [layer.qkv, layer.output, layer.mlp.gate_up, layer.mlp.down]
        if not all(map(is_supported, linears)) or not FlashPrefill.fits(config.head_dim, 0, config.head_dim):
            return None
        return cls(config, weights, library, max_rows)

    def __init__(self, config: DenseConfig, weights: DenseWeights, library: Library, max_rows: int) -> None:
        super().__init__(library, max_rows, weights.norm, config.rms_norm_eps, weights.head)
        self._config = config
        self._weights = weights
        self._flash = FlashPrefill(library)
        self._inverse = inverse_frequencies(config.rope)
        buffers = self._buffers
        first = weights.layers[0]
        inner = first.mlp.gate_up.out_features
        self._qkv = buffers.of(first.qkv.out_features, bfloat16)
        self._attended = buffers.of(config.num_heads * config.head_dim, bfloat16)
        self._inner = (buffers.of(inner, bfloat16), buffers.of(inner // 2, bfloat16))
        self._tables = buffers.of(config.head_dim, float32)

    def _record(self, cache: KvCache) -> Program:
        config, program = self._config, Program(self._library)
        program.add(Code.EMBED, self._x, self._weights.embedding, config.hidden_size)
        program.add(Code.ROPE_TABLES, self._tables, self._inverse, config.head_dim // 2)
        for index, layer in enumerate(self._weights.layers):
            add_norm(program, self._x, layer.input_norm, self._normed, config.rms_norm_eps)
            add_linear(program, self._normed, layer.qkv, self._qkv, BF16)
            self._attention(program, index, cache)
            add_linear(program, self._attended, layer.output, self._x, ADDED)
            self._feed_forward(program, layer)
        return program

    def _feed_forward(self, program: Program, layer: DenseLayer) -> None:
        add_norm(program, self._x, layer.post_norm, self._normed, self._config.rms_norm_eps)
        add_mlp(program, self._normed, layer.mlp.gate_up, layer.mlp.down, self._inner, self._x)

    def _attention(self, program: Program, layer: int, cache: KvCache) -> None:
        config = self._config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        rope = config.rope
        tokens, row = cache.layout.block_tokens, cache.blocks.shape[-1]
        offset, block = layer * tokens * row, config.num_layers * tokens * row
        program.add(
            Code.ROTATE_GQA, self._qkv, self._tables, heads, kv_heads, dim, int(rope.interleaved), float(rope.table_factor),
            offset, row,
        )  # fmt: skip
        window = config.window_of(layer) or 0
        place = len(program)

        def wide(batch: ForwardBatch, cache: KvCache, rows: int) -> None:
            cache.stored(layer)
            if batch.decodes is not None:
                program.run_one(place, batch, cache, batch.decodes.count)
            queries = self._qkv.view(-1, heads + 2 * kv_heads, dim)
            for part in batch.prefills:
                chunk = slice(part.first, part.first + part.count)
                self._flash.gqa(
                    queries[chunk, :heads], self._attended[chunk].view(-1, heads, dim), layer, cache, part, kv_heads, window
                )

        program.add(
            Code.ATTEND, self._qkv, self._attended, heads // kv_heads, kv_heads, dim, dim,
            0, dim, kv_heads * dim, dim, dim**-0.5, window, offset, row, block, tokens, (heads + 2 * kv_heads) * dim,
            wide=wide,
        )  # fmt: skip
