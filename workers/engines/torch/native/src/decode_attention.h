// Attention of one query row per sequence over paged rows, for a group of heads that share their keys and values.
// A context is cut into splits of fixed length, so the order of additions depends on the sequence's own length alone.
#pragma once

#include <vector>

#include "dot_product.h"

constexpr int64_t SPLIT_TOKENS = 128;
constexpr int MAX_HEAD_TILE = 6;

struct PagedRows {
    const bf16* layer;      // first row of the layer in block 0
    int64_t block_values;   // from a block to the next
    int64_t row_values;     // from a token to the next
    int64_t block_tokens;
};

struct DecodeShape {
    int64_t groups, heads, key_dim, value_dim;  // heads of one group
    int64_t key_offset, key_step;               // where group g's keys and values lie in a row: offset + g * step
    int64_t value_offset, value_step;
    float scale;
    int64_t window;  // 0: none
};

// Partial result of one head over one split: largest score, sum of weights, weighted values.
struct Partial {
    float* max;
    float* sum;
    float* values;
};

// Accumulates values of 64 columns (or fewer) for up to MAX_HEAD_TILE heads over all keys of a split.
template <int H>
static inline void mix_columns(
    const bf16* const* rows, int keys, const uint32_t* pairs, int64_t pair_stride, int64_t column, int columns, float* out,
    int64_t out_stride) {
    __m512 acc[H][4];
    UNROLL for (int h = 0; h < H; ++h)
        UNROLL for (int c = 0; c < 4; ++c) acc[h][c] = _mm512_setzero_ps();
    const int upper = columns - 32;
    for (int j = 0; j < keys; j += 2) {
        const bf16* a = rows[j] + column;
        const bf16* b = rows[j + 1 < keys ? j + 1 : j] + column;
        const __m512i a0 = load_tail(a, columns), b0 = load_tail(b, columns);
        const __m512bh v0 = (__m512bh)_mm512_unpacklo_epi16(a0, b0), v1 = (__m512bh)_mm512_unpackhi_epi16(a0, b0);
        __m512bh v2 = v0, v3 = v0;
        if (upper > 0) {
            const __m512i a1 = load_tail(a + 32, upper), b1 = load_tail(b + 32, upper);
            v2 = (__m512bh)_mm512_unpacklo_epi16(a1, b1);
            v3 = (__m512bh)_mm512_unpackhi_epi16(a1, b1);
        }
        UNROLL for (int h = 0; h < H; ++h) {
            const __m512bh p = (__m512bh)_mm512_set1_epi32((int)pairs[h * pair_stride + j / 2]);
            acc[h][0] = _mm512_dpbf16_ps(acc[h][0], v0, p);
            acc[h][1] = _mm512_dpbf16_ps(acc[h][1], v1, p);
            if (upper > 0) {
                acc[h][2] = _mm512_dpbf16_ps(acc[h][2], v2, p);
                acc[h][3] = _mm512_dpbf16_ps(acc[h][3], v3, p);
            }
        }
    }
    // Unpacking left groups of four columns: lane q of the first register holds columns 8q .. 8q+3, of the second 8q+4 .. 8q+7.
    alignas(64) float lanes[16];
    UNROLL for (int h = 0; h < H; ++h)
        UNROLL for (int c = 0; c < 4; ++c) {
            if (c >= 2 && upper <= 0) continue;
            _mm512_store_ps(lanes, acc[h][c]);
            for (int lane = 0; lane < 16; ++lane) {
                const int at = (c / 2) * 32 + (lane / 4) * 8 + (c % 2) * 4 + lane % 4;
                if (at < columns) out[h * out_stride + column + at] = lanes[lane];
            }
        }
}

template <int H>
static void attend_tile(
    const bf16* const* queries, const bf16* const* keys, const bf16* const* values, int count, const DecodeShape& shape,
    Partial out) {
    alignas(64) float scores[H][SPLIT_TOKENS];
    alignas(64) uint32_t pairs[H][SPLIT_TOKENS / 2];
    dot_rows<0>(queries, H, [&](int64_t n) { return keys[n]; }, 0, count, shape.key_dim, StoreF32{&scores[0][0], SPLIT_TOKENS});
    for (int h = 0; h < H; ++h) {
        __m512 highest = _mm512_set1_ps(-INFINITY);
        for (int n = 0; n < count; n += 16) {
            const __mmask16 mask = count - n >= 16 ? 0xffff : (1u << (count - n)) - 1u;
            highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_load_ps(&scores[h][n]));
        }
        const float top = _mm512_reduce_max_ps(highest);
        const __m512 offset = _mm512_set1_ps(top), scale = _mm512_set1_ps(shape.scale);
        __m512 total = _mm512_setzero_ps();
        bf16* weights = (bf16*)pairs[h];
        for (int n = 0; n < count; n += 16) {
            const int rest = count - n < 16 ? count - n : 16;
            const __mmask16 mask = rest >= 16 ? 0xffff : (1u << rest) - 1u;
            const __m512 shifted = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(&scores[h][n]), offset), scale);
            const __m512 weight = _mm512_maskz_mov_ps(mask, exp_nonpositive(shifted));
            total = _mm512_add_ps(total, weight);
            _mm256_storeu_si256((__m256i*)(weights + n), (__m256i)_mm512_cvtneps_pbh(weight));
        }
        out.max[h] = top * shape.scale;
        out.sum[h] = _mm512_reduce_add_ps(total);
    }
    for (int64_t column = 0; column < shape.value_dim; column += 64) {
        const int columns = (int)(shape.value_dim - column < 64 ? shape.value_dim - column : 64);
        mix_columns<H>(values, count, &pairs[0][0], SPLIT_TOKENS / 2, column, columns, out.values, shape.value_dim);
    }
}

// Heads of one group over the tokens [first, last) of one sequence. queries: [heads][key_dim], contiguous rows.
static void attend_split(
    const bf16* queries, int64_t query_stride, const PagedRows& paged, const int32_t* table, int64_t first, int64_t last,
    int64_t group, const DecodeShape& shape, Partial out) {
    const bf16* keys[SPLIT_TOKENS];
    const bf16* values[SPLIT_TOKENS];
    const int count = (int)(last - first);
    for (int n = 0; n < count; ++n) {
        const int64_t token = first + n;
        const bf16* row = paged.layer + (int64_t)table[token / paged.block_tokens] * paged.block_values +
                          token % paged.block_tokens * paged.row_values;
        keys[n] = row + shape.key_offset + group * shape.key_step;
        values[n] = row + shape.value_offset + group * shape.value_step;
    }
    for (int64_t head = 0; head < shape.heads;) {
        const bf16* q[MAX_HEAD_TILE];
        const int64_t left = shape.heads - head;
        const int tile = left >= 8 || left == 6 ? 6 : left == 7 ? 4 : (int)left;
        for (int h = 0; h < tile; ++h) q[h] = queries + (head + h) * query_stride;
        const Partial part{out.max + head, out.sum + head, out.values + head * shape.value_dim};
        switch (tile) {
            case 1: attend_tile<1>(q, keys, values, count, shape, part); break;
            case 2: attend_tile<2>(q, keys, values, count, shape, part); break;
            case 3: attend_tile<3>(q, keys, values, count, shape, part); break;
            case 4: attend_tile<4>(q, keys, values, count, shape, part); break;
            case 5: attend_tile<5>(q, keys, values, count, shape, part); break;
            default: attend_tile<6>(q, keys, values, count, shape, part); break;
        }
        head += tile;
    }
}

// One head: its splits together, normalised.
static void merge_splits(const float* max, const float* sum, const float* values, int64_t splits, int64_t step,
                         int64_t value_dim, bf16* out) {
    float top = -INFINITY, total = 0;
    for (int64_t s = 0; s < splits; ++s) top = max[s * step] > top ? max[s * step] : top;
    for (int64_t s = 0; s < splits; ++s) total += sum[s * step] * std::exp(max[s * step] - top);
    for (int64_t column = 0; column < value_dim; column += 16) {
        const int rest = value_dim - column < 16 ? (int)(value_dim - column) : 16;
        __m512 acc = _mm512_setzero_ps();
        for (int64_t s = 0; s < splits; ++s) {
            const __m512 share = _mm512_set1_ps(std::exp(max[s * step] - top) / total);
            acc = _mm512_fmadd_ps(load_f32(values + s * step * value_dim + column, rest), share, acc);
        }
        store_bf16(out + column, acc, rest);
    }
}
