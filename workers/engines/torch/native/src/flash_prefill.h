// Attention of a chunk of one sequence over one tile of its context, with a running softmax (Milakov and Gimelshein 2018;

// FlashAttention-2): the state of every query row stays between tiles, so memory grows with the chunk and the tile only.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

struct FlashTile {
    const bf16* q;  // [count][heads][key_dim], through its strides
    int64_t q_row, q_head;
    int64_t count, q_start, heads, group;  // rows at positions from q_start on; `group` heads share one key head
    const bf16* k;  // the part of a key that each key head has for itself
    int64_t k_row, k_head, k_dim;
    const bf16* shared;  // the part of a key that all heads share
    int64_t shared_row, shared_dim;
    const bf16* v;
    int64_t v_row, v_head, v_dim;
    int64_t start, length;  // positions [start, start + length) of the context
    int64_t window;         // 0: none
    float* max;             // [heads][count]
    float* sum;             // [heads][count]
    float* acc;             // [heads][count][v_dim]
    bf16* out;              // [count][heads][v_dim], written when this is the last tile; else 0
    uint32_t* packed;       // scratch: key heads * blocks of 64 keys * 32 * (k_dim + shared_dim + v_dim) words
    int64_t first;          // 1: the state is new
    double scale;
};

constexpr int KEY_BLOCK = 64;
constexpr int64_t QUERY_BLOCK = 48;

struct FlashLayout {
    int64_t blocks, key_pairs, block_words, head_words;
    explicit FlashLayout(const FlashTile& t)
        : blocks((t.length + KEY_BLOCK - 1) / KEY_BLOCK),
          key_pairs((t.k_dim + t.shared_dim) / 2),
          block_words(KEY_BLOCK * key_pairs + KEY_BLOCK / 2 * t.v_dim),
          head_words(blocks * block_words) {}
};

// Keys as [pair of values][64 keys], then values as [pair of keys][v_dim], so that both products read along their rows.
static inline void pack_block(const FlashTile& t, const FlashLayout& layout, int64_t head, int64_t block) {
    uint32_t* keys = t.packed + head * layout.head_words + block * layout.block_words;
    const int64_t first = block * KEY_BLOCK;
    const int valid = (int)(t.length - first < KEY_BLOCK ? t.length - first : KEY_BLOCK);
    const int64_t own = t.k_dim / 2;
    for (int j = 0; j < KEY_BLOCK; j += 16) {
        const int rows = valid - j < 0 ? 0 : valid - j < 16 ? valid - j : 16;
        const __mmask16 mask = (__mmask16)((1u << rows) - 1u);
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i zero = _mm512_setzero_si512();
        const __m512i own_at = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)t.k_row * 2));
        const __m512i shared_at = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)t.shared_row * 2));
        const bf16* own_rows = t.k + (first + j) * t.k_row + head * t.k_head;
        const bf16* shared_rows = t.shared + (first + j) * t.shared_row;
        for (int64_t pair = 0; pair < layout.key_pairs; ++pair) {
            const __m512i values = pair < own ? _mm512_mask_i32gather_epi32(zero, mask, own_at, own_rows + 2 * pair, 1)
                                              : _mm512_mask_i32gather_epi32(zero, mask, shared_at, shared_rows + 2 * (pair - own), 1);
            _mm512_storeu_si512(keys + pair * KEY_BLOCK + j, values);
        }
    }
    uint32_t* values = keys + KEY_BLOCK * layout.key_pairs;
    for (int j = 0; j < KEY_BLOCK; j += 2) {
        const bf16* a = t.v + (first + j) * t.v_row + head * t.v_head;
        for (int64_t column = 0; column < t.v_dim; column += 16) {
            const __m512i lower = j < valid ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + column))) : _mm512_setzero_si512();
            const __m512i upper = j + 1 < valid ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + t.v_row + column))) : _mm512_setzero_si512();
            _mm512_storeu_si512(values + j / 2 * t.v_dim + column, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
        }
    }
}

template <int M>
static inline void multiply_pairs(const uint32_t* const* a, int64_t pairs, const uint32_t* b, int64_t b_row, __m512 (*c)[4]) {
    for (int64_t k = 0; k < pairs; ++k, b += b_row) {
        __m512bh column[4];
        UNROLL for (int j = 0; j < 4; ++j) column[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
        UNROLL for (int i = 0; i < M; ++i) {
            const __m512bh value = (__m512bh)_mm512_set1_epi32((int)a[i][k]);
            UNROLL for (int j = 0; j < 4; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], value, column[j]);
        }
    }
}

static inline uint64_t visible_keys(const FlashTile& t, int64_t position, int64_t block_start) {
    int64_t last = position - block_start;  // of the block, inclusive
    const int64_t end = t.start + t.length - block_start - 1;
    if (last > end) last = end;
    if (last < 0) return 0;
    uint64_t mask = last >= 63 ? ~0ull : (1ull << (last + 1)) - 1ull;
    const int64_t first = t.window ? position - t.window + 1 - block_start : 0;
    if (first > 63) return 0;
    return first > 0 ? mask & ~((1ull << first) - 1ull) : mask;
}

// M query rows of one head against one block of 64 keys.
template <int M>
static inline void flash_block(const FlashTile& t, const FlashLayout& layout, int64_t head, int64_t row, int64_t block) {
    const int64_t block_start = t.start + block * KEY_BLOCK, position = t.q_start + row;
    const uint32_t* keys = t.packed + head / t.group * layout.head_words + block * layout.block_words;
    const uint32_t* values = keys + KEY_BLOCK * layout.key_pairs;
    const uint32_t* q[M];
    for (int i = 0; i < M; ++i) q[i] = (const uint32_t*)(t.q + (row + i) * t.q_row + head * t.q_head);
    __m512 score[M][4];
    UNROLL for (int i = 0; i < M; ++i)
        UNROLL for (int j = 0; j < 4; ++j) score[i][j] = _mm512_setzero_ps();
    multiply_pairs<M>(q, layout.key_pairs, keys, KEY_BLOCK, score);
    const bool all = visible_keys(t, position, block_start) == ~0ull && visible_keys(t, position + M - 1, block_start) == ~0ull;
    alignas(64) bf16 weight[M][KEY_BLOCK];
    const __m512 scale = _mm512_set1_ps((float)t.scale), lowest = _mm512_set1_ps(-INFINITY);
    float* max = t.max + head * t.count + row;
    float* sum = t.sum + head * t.count + row;
    UNROLL for (int i = 0; i < M; ++i) {
        if (!all) {
            const uint64_t seen = visible_keys(t, position + i, block_start);
            UNROLL for (int j = 0; j < 4; ++j) score[i][j] = _mm512_mask_mov_ps(lowest, (__mmask16)(seen >> (16 * j)), score[i][j]);
        }
        const __m512 top = _mm512_max_ps(_mm512_max_ps(score[i][0], score[i][1]), _mm512_max_ps(score[i][2], score[i][3]));
        const float highest = [](float a, float b) { return a > b ? a : b; }(max[i], _mm512_reduce_max_ps(top));
        const __m512 offset = _mm512_set1_ps(highest == -INFINITY ? 0.0f : highest);
        __m512 total = _mm512_setzero_ps();
        UNROLL for (int j = 0; j < 4; ++j) {
            const __m512 p = exp_nonpositive(_mm512_mul_ps(_mm512_sub_ps(score[i][j], offset), scale));
            total = _mm512_add_ps(total, p);
            _mm256_store_si256((__m256i*)(weight[i] + 16 * j), (__m256i)_mm512_cvtneps_pbh(p));
        }
        if (highest != max[i]) {
            const float shrink = max[i] == -INFINITY ? 0.0f : std::exp((max[i] - highest) * (float)t.scale);
            float* acc = t.acc + (head * t.count + row + i) * t.v_dim;
            for (int64_t c = 0; c < t.v_dim; c += 16) _mm512_storeu_ps(acc + c, _mm512_mul_ps(_mm512_loadu_ps(acc + c), _mm512_set1_ps(shrink)));
            sum[i] *= shrink;
            max[i] = highest;
        }
        sum[i] += _mm512_reduce_add_ps(total);
    }
    const uint32_t* p[M];
    for (int i = 0; i < M; ++i) p[i] = (const uint32_t*)weight[i];
    float* acc = t.acc + (head * t.count + row) * t.v_dim;
    int64_t column = 0;
    for (; column + 64 <= t.v_dim; column += 64) {
        __m512 c[M][4];
        UNROLL for (int i = 0; i < M; ++i)
            UNROLL for (int j = 0; j < 4; ++j) c[i][j] = _mm512_loadu_ps(acc + i * t.v_dim + column + 16 * j);
        multiply_pairs<M>(p, KEY_BLOCK / 2, values + column, t.v_dim, c);
        UNROLL for (int i = 0; i < M; ++i)
            UNROLL for (int j = 0; j < 4; ++j) _mm512_storeu_ps(acc + i * t.v_dim + column + 16 * j, c[i][j]);
    }
    for (; column < t.v_dim; column += 16) {
        __m512 c[M];
        UNROLL for (int i = 0; i < M; ++i) c[i] = _mm512_loadu_ps(acc + i * t.v_dim + column);
        for (int k = 0; k < KEY_BLOCK / 2; ++k) {
            const __m512bh b = (__m512bh)_mm512_loadu_si512(values + k * t.v_dim + column);
            UNROLL for (int i = 0; i < M; ++i) c[i] = _mm512_dpbf16_ps(c[i], (__m512bh)_mm512_set1_epi32((int)p[i][k]), b);
        }
        UNROLL for (int i = 0; i < M; ++i) _mm512_storeu_ps(acc + i * t.v_dim + column, c[i]);
    }
}

static inline void flash_rows(const FlashTile& t, const FlashLayout& layout, int64_t head, int64_t row, int64_t rows, int64_t block) {
    switch (rows) {
        case 1: return flash_block<1>(t, layout, head, row, block);
        case 2: return flash_block<2>(t, layout, head, row, block);
        case 3: return flash_block<3>(t, layout, head, row, block);
        case 4: return flash_block<4>(t, layout, head, row, block);
        case 5: return flash_block<5>(t, layout, head, row, block);
        default: return flash_block<6>(t, layout, head, row, block);
    }
}

static inline void flash_query_block(const FlashTile& t, const FlashLayout& layout, int64_t head, int64_t first, int64_t last) {
    if (t.first) {
        std::fill(t.max + head * t.count + first, t.max + head * t.count + last, -INFINITY);
        std::fill(t.sum + head * t.count + first, t.sum + head * t.count + last, 0.0f);
        std::fill(t.acc + (head * t.count + first) * t.v_dim, t.acc + (head * t.count + last) * t.v_dim, 0.0f);
    }
    for (int64_t block = 0; block < layout.blocks; ++block) {
        const int64_t start = t.start + block * KEY_BLOCK;
        if (start > t.q_start + last - 1) break;
        for (int64_t row = first; row < last; row += 6) {
            const int64_t rows = last - row < 6 ? last - row : 6;
            if (start > t.q_start + row + rows - 1) continue;
            if (t.window && start + KEY_BLOCK - 1 < t.q_start + row - t.window + 1) continue;
            flash_rows(t, layout, head, row, rows, block);
        }
    }
    if (!t.out) return;
    for (int64_t row = first; row < last; ++row) {
        const int64_t at = head * t.count + row;
        const __m512 inverse = _mm512_set1_ps(1.0f / t.sum[at]);
        for (int64_t c = 0; c < t.v_dim; c += 16)
            store_bf16(t.out + (row * t.heads + head) * t.v_dim + c, _mm512_mul_ps(_mm512_loadu_ps(t.acc + at * t.v_dim + c), inverse), 16);
    }
}

// Called by every thread of an OpenMP team.
static inline void flash_tile(const FlashTile& t) {
    const FlashLayout layout(t);
    const int64_t key_heads = t.heads / t.group, query_blocks = (t.count + QUERY_BLOCK - 1) / QUERY_BLOCK;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < key_heads * layout.blocks; ++task) pack_block(t, layout, task / layout.blocks, task % layout.blocks);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < t.heads * query_blocks; ++task) {
        // The last rows of a chunk see most keys: they go first.
        const int64_t head = task % t.heads, block = query_blocks - 1 - task / t.heads;
        const int64_t first = block * QUERY_BLOCK, last = first + QUERY_BLOCK < t.count ? first + QUERY_BLOCK : t.count;
        flash_query_block(t, layout, head, first, last);
    }
}
