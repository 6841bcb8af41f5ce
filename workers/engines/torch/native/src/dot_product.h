// Products of a few rows with a matrix whose rows lie contiguous: out[m][n] = sum_k x[m][k] w[n][k], accumulated in fp32.
// Both operands are read along k, so a checkpoint's [O, I] weights, and rows of the KV pool, are used as they lie.
#pragma once

#include "simd.h"

// What becomes of four, or sixteen, neighbouring results of one row.
struct StoreBf16 {
    bf16* out;
    int64_t stride;
    void operator()(int64_t m, int64_t n, __m128 v, int count) const {
        _mm_mask_storeu_epi16(out + m * stride + n, (1u << count) - 1u, (__m128i)_mm_cvtneps_pbh(v));
    }
    void row(int64_t m, int64_t n, __m512 v, int count) const { store_bf16(out + m * stride + n, v, count); }
};

struct StoreF32 {
    float* out;
    int64_t stride;
    void operator()(int64_t m, int64_t n, __m128 v, int count) const {
        _mm_mask_storeu_ps(out + m * stride + n, (1u << count) - 1u, v);
    }
    void row(int64_t m, int64_t n, __m512 v, int count) const { store_f32(out + m * stride + n, v, count); }
};

struct AddF32 {
    float* out;
    int64_t stride;
    void operator()(int64_t m, int64_t n, __m128 v, int count) const {
        const __mmask8 mask = (1u << count) - 1u;
        float* p = out + m * stride + n;
        _mm_mask_storeu_ps(p, mask, _mm_add_ps(_mm_maskz_loadu_ps(mask, p), v));
    }
    void row(int64_t m, int64_t n, __m512 v, int count) const {
        float* p = out + m * stride + n;
        store_f32(p, _mm512_add_ps(load_f32(p, count), v), count);
    }
};

// MR rows of x against NR = 4 * G rows of w; `valid` of the NR rows are real, the others repeat the last one.
// AHEAD: rows of w lie side by side, and those AHEAD rows further on are fetched meanwhile.
template <int MR, int G, int AHEAD, class Rows, class Emit>
static inline void dot_tile(const bf16* const* x, Rows w, int64_t n, int valid, int64_t depth, int64_t m, const Emit& emit) {
    constexpr int NR = 4 * G;
    __m512 acc[MR][NR];
    UNROLL for (int i = 0; i < MR; ++i)
        UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_setzero_ps();
    const bf16* row[NR];
    UNROLL for (int j = 0; j < NR; ++j) row[j] = w(n + (j < valid ? j : valid - 1));
    int64_t k = 0;
    for (; k + 32 <= depth; k += 32) {
        __m512bh wide[MR];
        UNROLL for (int i = 0; i < MR; ++i) wide[i] = (__m512bh)_mm512_loadu_si512(x[i] + k);
        UNROLL for (int j = 0; j < NR; ++j) {
            const __m512bh weight = (__m512bh)_mm512_loadu_si512(row[j] + k);
            if (AHEAD) _mm_prefetch((const char*)(row[j] + k + AHEAD * depth), _MM_HINT_T0);
            UNROLL for (int i = 0; i < MR; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], wide[i], weight);
        }
    }
    if (k < depth) {
        const int rest = (int)(depth - k);
        UNROLL for (int j = 0; j < NR; ++j) {
            const __m512bh weight = (__m512bh)load_tail(row[j] + k, rest);
            UNROLL for (int i = 0; i < MR; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)load_tail(x[i] + k, rest), weight);
        }
    }
    UNROLL for (int i = 0; i < MR; ++i)
        UNROLL for (int g = 0; g < G; ++g) {
            const int count = valid - 4 * g < 4 ? valid - 4 * g : 4;
            if (count > 0) emit(m + i, n + 4 * g, sum4(acc[i][4 * g], acc[i][4 * g + 1], acc[i][4 * g + 2], acc[i][4 * g + 3]), count);
        }
}

template <int MR, int G, int AHEAD, class Rows, class Emit>
static inline void dot_strip(const bf16* const* x, Rows w, int64_t first, int64_t last, int64_t depth, int64_t m, const Emit& emit) {
    for (int64_t n = first; n < last; n += 4 * G) {
        const int valid = last - n < 4 * G ? (int)(last - n) : 4 * G;
        dot_tile<MR, G, AHEAD>(x, w, n, valid, depth, m, emit);
    }
}

// Rows [0, count) of x, given by pointers, against rows [first, last) of w. The order of additions depends on neither.
template <int AHEAD, class Rows, class Emit>
static void dot_rows(const bf16* const* x, int64_t count, Rows w, int64_t first, int64_t last, int64_t depth, const Emit& emit) {
    // Up to three rows the memory is the limit, and its own prefetching the best.
    if (count == 1) return dot_strip<1, 2, 0>(x, w, first, last, depth, 0, emit);
    if (count == 2) return dot_strip<2, 2, 0>(x, w, first, last, depth, 0, emit);
    if (count == 3) return dot_strip<3, 2, 0>(x, w, first, last, depth, 0, emit);
    // Four rows of w stay in the first-level cache while all rows of x pass over them.
    for (int64_t n = first; n < last; n += 4) {
        const int64_t end = n + 4 < last ? n + 4 : last;
        int64_t m = 0;
        if (count == 5) dot_strip<5, 1, AHEAD>(x, w, n, end, depth, 0, emit), m = 5;
        else if (count == 6 || count > 8) dot_strip<6, 1, AHEAD>(x, w, n, end, depth, 0, emit), m = 6;
        else dot_strip<4, 1, AHEAD>(x, w, n, end, depth, 0, emit), m = 4;
        for (; count - m == 6 || count - m > 8; m += 6) dot_strip<6, 1, 0>(x + m, w, n, end, depth, m, emit);
        if (count - m == 5) dot_strip<5, 1, 0>(x + m, w, n, end, depth, m, emit), m += 5;
        for (; count - m >= 4; m += 4) dot_strip<4, 1, 0>(x + m, w, n, end, depth, m, emit);
        if (count - m == 3) dot_strip<3, 1, 0>(x + m, w, n, end, depth, m, emit);
        else if (count - m == 2) dot_strip<2, 1, 0>(x + m, w, n, end, depth, m, emit);
        else if (count - m == 1) dot_strip<1, 1, 0>(x + m, w, n, end, depth, m, emit);
    }
}

// A row of activations as 15-bit integers in two planes of signed bytes: x = step * (256 * high + low).
// Weights stay what they are; the rounding of x is 2^-15 of the row's largest value, finer than bfloat16 for that value.
struct ByteRow {
    const int8_t* high;
    const int8_t* low;
    float step;
    int32_t high_sum;
    int32_t low_sum;
};

// The instruction multiplies unsigned by signed bytes, so weights are read as w + 128 and 128 * sum(x) is taken off again.
template <int MR, int G, class Emit>
static inline void byte_tile(
    const ByteRow* x, const int8_t* w, const float* scale, int64_t n, int valid, int64_t depth, int64_t m, const Emit& emit) {
    constexpr int NR = 4 * G;
    __m512i high[MR][NR], low[MR][NR];
    UNROLL for (int i = 0; i < MR; ++i)
        UNROLL for (int j = 0; j < NR; ++j) high[i][j] = low[i][j] = _mm512_setzero_si512();
    const int8_t* row[NR];
    UNROLL for (int j = 0; j < NR; ++j) row[j] = w + (n + (j < valid ? j : valid - 1)) * depth;
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    const auto multiply = [&](int64_t k, __m512i raw, int j) {
        const __m512i weight = _mm512_xor_si512(raw, flip);
        UNROLL for (int i = 0; i < MR; ++i) {
            high[i][j] = _mm512_dpbusd_epi32(high[i][j], weight, _mm512_loadu_si512(x[i].high + k));
            low[i][j] = _mm512_dpbusd_epi32(low[i][j], weight, _mm512_loadu_si512(x[i].low + k));
        }
    };
    int64_t k = 0;
    for (; k + 64 <= depth; k += 64)
        UNROLL for (int j = 0; j < NR; ++j) multiply(k, _mm512_loadu_si512(row[j] + k), j);
    if (k < depth) {
        const __mmask64 mask = (1ull << (depth - k)) - 1ull;
        UNROLL for (int j = 0; j < NR; ++j) multiply(k, _mm512_maskz_loadu_epi8(mask, row[j] + k), j);
    }
    UNROLL for (int g = 0; g < G; ++g) {
        const int count = valid - 4 * g < 4 ? valid - 4 * g : 4;
        if (count <= 0) continue;
        const __m128 scales = _mm_maskz_loadu_ps((1u << count) - 1u, scale + n + 4 * g);
        UNROLL for (int i = 0; i < MR; ++i) {
            const __m512i *h = high[i] + 4 * g, *l = low[i] + 4 * g;
            const __m128i above = _mm_sub_epi32(sum4(h[0], h[1], h[2], h[3]), _mm_set1_epi32(128 * x[i].high_sum));
            const __m128i below = _mm_sub_epi32(sum4(l[0], l[1], l[2], l[3]), _mm_set1_epi32(128 * x[i].low_sum));
            const __m128 sum = _mm_fmadd_ps(_mm_cvtepi32_ps(above), _mm_set1_ps(256.0f), _mm_cvtepi32_ps(below));
            emit(m + i, n + 4 * g, _mm_mul_ps(_mm_mul_ps(sum, scales), _mm_set1_ps(x[i].step)), count);
        }
    }
}

// The planes of x are zero from `depth` up to the next multiple of 64.
template <class Emit>
static void byte_rows(
    const ByteRow* x, int64_t count, const int8_t* w, const float* scale, int64_t first, int64_t last, int64_t depth,
    const Emit& emit) {
    constexpr int64_t AHEAD = 8;  // rows; rows of bytes are too short for the memory's own prefetching
    for (int64_t n = first; n < last; n += 4) {
        const int valid = last - n < 4 ? (int)(last - n) : 4;
        for (int64_t k = 0; k < 4 * depth; k += 64) _mm_prefetch((const char*)w + (n + AHEAD) * depth + k, _MM_HINT_T0);
        int64_t m = 0;
        for (; count - m >= 3; m += 3) byte_tile<3, 1>(x + m, w, scale, n, valid, depth, m, emit);
        if (count - m == 2) byte_tile<2, 1>(x + m, w, scale, n, valid, depth, m, emit);
        else if (count - m == 1) byte_tile<1, 1>(x + m, w, scale, n, valid, depth, m, emit);
    }
}
