// The same product for more rows of x: sixteen of them lie across a register, and each pair of weights is spread over it, so
// that nothing has to be summed across lanes. x is packed once as [pair of values][16 rows] for each sixteen rows.
#pragma once

#include <vector>

#include "dot_product.h"

static inline void transpose16(__m512* r) {
    __m512 t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = (__m512)_mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
        r[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
        r[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
        r[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

struct PackedRows {
    std::vector<uint32_t> words;
    int64_t pairs = 0, groups = 0;

    // Rows beyond `count`, and the odd end of a depth, are filled up with zeros.
    void pack(const bf16* const* x, int64_t count, int64_t depth) {
        pairs = (depth + 1) / 2;
        groups = (count + 15) / 16;
        if ((int64_t)words.size() < groups * pairs * 16) words.resize(groups * pairs * 16);
        for (int64_t group = 0; group < groups; ++group) {
            const int rows = (int)(count - group * 16 < 16 ? count - group * 16 : 16);
            for (int64_t k = 0; k < pairs; k += 16) {
                __m512 r[16];
                UNROLL for (int i = 0; i < 16; ++i) {
                    const int64_t rest = depth - 2 * k;
                    r[i] = i < rows ? (__m512)load_tail(x[group * 16 + i] + 2 * k, rest < 32 ? (int)rest : 32) : _mm512_setzero_ps();
                }
                transpose16(r);
                uint32_t* out = words.data() + (group * pairs + k) * 16;
                UNROLL for (int i = 0; i < 16; ++i)
                    if (k + i < pairs) _mm512_storeu_ps(out + i * 16, r[i]);
            }
        }
    }
};

// Sums of NR rows of w with G groups of sixteen rows of x, into sums[group][row of w][16].
template <int NR, int G>
static inline void outer_tile(const PackedRows& x, int64_t group, const bf16* w, int64_t depth, float (*sums)[16][16], int at) {
    __m512 acc[G][NR];
    UNROLL for (int g = 0; g < G; ++g)
        UNROLL for (int j = 0; j < NR; ++j) acc[g][j] = _mm512_setzero_ps();
    const uint32_t* rows = x.words.data() + group * x.pairs * 16;
    const int64_t step = x.pairs * 16;
    int64_t k = 0;
    for (; k < depth / 2; ++k) {
        __m512bh column[G];
        UNROLL for (int g = 0; g < G; ++g) column[g] = (__m512bh)_mm512_loadu_si512(rows + g * step + k * 16);
        UNROLL for (int j = 0; j < NR; ++j) {
            int pair;
            std::memcpy(&pair, w + j * depth + 2 * k, 4);
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
            UNROLL for (int g = 0; g < G; ++g) acc[g][j] = _mm512_dpbf16_ps(acc[g][j], column[g], weight);
        }
        if (k % 16 == 0) {
            UNROLL for (int j = 0; j < NR; ++j) _mm_prefetch((const char*)(w + (j + NR) * depth + 2 * k), _MM_HINT_T0);
        }
    }
    if (depth % 2) {
        UNROLL for (int j = 0; j < NR; ++j) {
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(w[j * depth + depth - 1]);
            UNROLL for (int g = 0; g < G; ++g)
                acc[g][j] = _mm512_dpbf16_ps(acc[g][j], (__m512bh)_mm512_loadu_si512(rows + g * step + k * 16), weight);
        }
    }
    UNROLL for (int g = 0; g < G; ++g)
        UNROLL for (int j = 0; j < NR; ++j) _mm512_store_ps(sums[g][at + j], acc[g][j]);
}

template <int G>
static inline void outer_rows(const PackedRows& x, int64_t group, const bf16* w, int64_t n, int valid, int64_t depth, float (*sums)[16][16]) {
    if (valid == 16) {
        outer_tile<8, G>(x, group, w + n * depth, depth, sums, 0);
        outer_tile<8, G>(x, group, w + (n + 8) * depth, depth, sums, 8);
        return;
    }
    for (int j = 0; j < valid; ++j) outer_tile<1, G>(x, group, w + (n + j) * depth, depth, sums, j);
}

// Sixteen rows of w at a time against all rows of x.
template <class Emit>
static void outer_product(const PackedRows& x, int64_t count, const bf16* w, int64_t first, int64_t last, int64_t depth, const Emit& emit) {
    alignas(64) float sums[3][16][16];
    for (int64_t n = first; n < last; n += 16) {
        const int valid = last - n < 16 ? (int)(last - n) : 16;
        for (int64_t group = 0; group < x.groups;) {
            const int64_t left = x.groups - group;
            const int groups = left == 4 ? 2 : left > 3 ? 3 : (int)left;
            if (groups == 3) outer_rows<3>(x, group, w, n, valid, depth, sums);
            else if (groups == 2) outer_rows<2>(x, group, w, n, valid, depth, sums);
            else outer_rows<1>(x, group, w, n, valid, depth, sums);
            for (int g = 0; g < groups; ++g) {
                __m512 r[16];
                UNROLL for (int j = 0; j < 16; ++j) r[j] = _mm512_load_ps(sums[g][j]);
                transpose16(r);
                UNROLL for (int i = 0; i < 16; ++i) _mm512_store_ps(sums[g][i], r[i]);
                const int64_t m = (group + g) * 16;
                for (int i = 0; i < 16 && m + i < count; ++i) emit.row(m + i, n, _mm512_load_ps(sums[g][i]), valid);
            }
            group += groups;
        }
    }
}

// Rows of x, given by pointers, against rows [first, last) of a matrix, by the cheaper of the two ways.
template <class Emit>
static void multiply_rows(const bf16* const* x, int64_t count, const bf16* w, int64_t first, int64_t last, int64_t depth, const Emit& emit) {
    if (count <= 8) return dot_rows<4>(x, count, [=](int64_t n) { return w + n * depth; }, first, last, depth, emit);
    static thread_local PackedRows packed;
    packed.pack(x, count, depth);
    outer_product(packed, count, w, first, last, depth, emit);
}
