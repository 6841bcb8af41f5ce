// Operations on single rows: norms, rotation, gating, quantisation, routing.
#pragma once

#include "dot_product.h"

static inline float mean_square(const float* x, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 v = load_f32(x + i, (int)(width - i));
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return _mm512_reduce_add_ps(sum) / (float)width;
}

static inline void norm_f32(const float* x, const bf16* weight, float eps, int64_t width, bf16* out) {
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean_square(x, width) + eps));
    for (int64_t i = 0; i < width; i += 16) {
        const int rest = (int)(width - i < 16 ? width - i : 16);
        store_bf16(out + i, _mm512_mul_ps(_mm512_mul_ps(load_f32(x + i, rest), scale), load_wide(weight + i, rest)), rest);
    }
}

static inline void norm_bf16(const bf16* x, const bf16* weight, float eps, int64_t width, bf16* out) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 v = load_wide(x + i, (int)(width - i));
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / (float)width + eps));
    for (int64_t i = 0; i < width; i += 16) {
        const int rest = (int)(width - i < 16 ? width - i : 16);
        store_bf16(out + i, _mm512_mul_ps(_mm512_mul_ps(load_wide(x + i, rest), scale), load_wide(weight + i, rest)), rest);
    }
}

// Rotates one head. tables: dim / 2 cosines, then dim / 2 sines. x and out may be the same.
static inline void rotate_head(const bf16* x, const float* tables, int64_t dim, bool interleaved, float factor, bf16* out) {
    const int64_t half = dim / 2;
    const float *cosine = tables, *sine = tables + half;
    if (!interleaved) {
        const __m512 scale = _mm512_set1_ps(factor);
        for (int64_t i = 0; i < half; i += 16) {
            const int rest = (int)(half - i < 16 ? half - i : 16);
            const __m512 a = load_wide(x + i, rest), b = load_wide(x + half + i, rest);
            const __m512 c = _mm512_mul_ps(load_f32(cosine + i, rest), scale), s = _mm512_mul_ps(load_f32(sine + i, rest), scale);
            store_bf16(out + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), rest);
            store_bf16(out + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), rest);
        }
        return;
    }
    for (int64_t i = 0; i < half; ++i) {
        const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
        const float c = cosine[i] * factor, s = sine[i] * factor;
        out[2 * i] = narrow(a * c - b * s);
        out[2 * i + 1] = narrow(b * c + a * s);
    }
}

static inline void scale_row(const bf16* x, float factor, int64_t width, bf16* out) {
    const __m512 scale = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < width; i += 16) {
        const int rest = (int)(width - i < 16 ? width - i : 16);
        store_bf16(out + i, _mm512_mul_ps(load_wide(x + i, rest), scale), rest);
    }
}

static inline void gate_row(const bf16* gate_up, int64_t width, bf16* out) {
    for (int64_t i = 0; i < width; i += 16) {
        const int rest = (int)(width - i < 16 ? width - i : 16);
        store_bf16(out + i, _mm512_mul_ps(silu(load_wide(gate_up + i, rest)), load_wide(gate_up + width + i, rest)), rest);
    }
}

// One row as two byte planes, see ByteRow; `planes` holds 2 * padded bytes, padded = width rounded up to 64.
static inline ByteRow quantise_row(const bf16* x, int64_t width, int8_t* planes) {
    const int64_t padded = (width + 63) / 64 * 64;
    __m512 top = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(load_wide(x + i, (int)(width - i))));
    const float largest = _mm512_reduce_max_ps(top);
    // 32,639 = 127 * 256 + 127: the greatest value whose planes both fit a signed byte.
    const float step = largest > 0 ? largest / 32639.0f : 1.0f;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 32639.0f / largest : 0.0f);
    int8_t *high = planes, *low = planes + padded;
    __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < padded; i += 16) {
        const int rest = i < width ? (int)(width - i < 16 ? width - i : 16) : 0;
        const __m512 v = rest ? load_wide(x + i, rest) : _mm512_setzero_ps();
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
        const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        const __m512i l = _mm512_sub_epi32(q, _mm512_slli_epi32(h, 8));
        high_sum = _mm512_add_epi32(high_sum, h);
        low_sum = _mm512_add_epi32(low_sum, l);
        _mm_storeu_si128((__m128i*)(high + i), _mm512_cvtepi32_epi8(h));
        _mm_storeu_si128((__m128i*)(low + i), _mm512_cvtepi32_epi8(l));
    }
    return {high, low, step, _mm512_reduce_add_epi32(high_sum), _mm512_reduce_add_epi32(low_sum)};
}

// Softmax over the experts, the k most likely of them (the lower id first among equals), weights as the rule says.
static inline void route_row(float* scores, int64_t experts, int64_t k, bool renormalise, float factor, int32_t* chosen, float* weights) {
    float top = scores[0], total = 0;
    for (int64_t e = 1; e < experts; ++e) top = scores[e] > top ? scores[e] : top;
    for (int64_t e = 0; e < experts; ++e) total += scores[e] = std::exp(scores[e] - top);
    float kept = 0;
    for (int64_t i = 0; i < k; ++i) {
        int64_t best = 0;
        for (int64_t e = 1; e < experts; ++e)
            if (scores[e] > scores[best]) best = e;
        chosen[i] = (int32_t)best;
        weights[i] = scores[best] / total;
        kept += weights[i];
        scores[best] = -1.0f;
    }
    for (int64_t i = 0; i < k; ++i) weights[i] = (renormalise ? weights[i] / (kept + 1e-20f) : weights[i]) * factor;
}
