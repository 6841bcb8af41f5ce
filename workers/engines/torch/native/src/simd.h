// Small vector pieces that the kernels share: bfloat16 in and out, sums across lanes, exp, and a barrier for a team of threads.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

// Registers in an array stay registers only when every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 24")

static inline __m512i load_tail(const bf16* p, int count) {
    return _mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffffu : (1u << count) - 1u, p);
}

static inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

static inline __m512 load_wide(const bf16* p, int count) {
    const __mmask16 mask = count >= 16 ? 0xffff : (1u << count) - 1u;
    return widen(_mm256_maskz_loadu_epi16(mask, p));
}

static inline void store_bf16(bf16* p, __m512 v, int count) {
    const __mmask16 mask = count >= 16 ? 0xffff : (1u << count) - 1u;
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

static inline __m512 load_f32(const float* p, int count) {
    return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : (1u << count) - 1u, p);
}

static inline void store_f32(float* p, __m512 v, int count) {
    _mm512_mask_storeu_ps(p, count >= 16 ? 0xffff : (1u << count) - 1u, v);
}

static inline bf16 narrow(float v) {
    return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(v)), 0);
}

static inline float to_float(bf16 v) {
    const uint32_t bits = (uint32_t)v << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// The sums over the lanes of four registers, in order.
static inline __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

static inline __m128i sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// exp(x) for x <= 0 to about 2 ulp: 2^n times a polynomial of degree 5 (Cephes expf coefficients). Very negative x give 0.
static inline __m512 exp_nonpositive(__m512 x) {
    const __mmask16 alive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_mov_ps(alive, _mm512_scalef_ps(p, n));
}

// silu(g) = g / (1 + exp(-g)), through the exponential of -|g| so that nothing overflows.
static inline __m512 silu(__m512 g) {
    const __m512 e = exp_nonpositive(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(g)));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __mmask16 positive = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_GE_OQ);
    const __m512 numerator = _mm512_mask_mov_ps(e, positive, one);
    return _mm512_div_ps(_mm512_mul_ps(g, numerator), _mm512_add_ps(one, e));
}

// All threads of a team wait here for each other. Spins briefly, then lets others run: the cores may be shared.
struct Barrier {
    std::atomic<int> arrived{0};
    std::atomic<int> phase{0};
    int threads = 1;

    void wait() {
        if (threads == 1) return;
        const int here = phase.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(here + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == here; ++spins) {
            if (spins < 4096) _mm_pause();
            else sched_yield();
        }
    }
};

// The run of `total` things, in units of `unit`, that belongs to thread `id` of `threads`.
static inline void split(int64_t total, int64_t unit, int id, int threads, int64_t* first, int64_t* last) {
    const int64_t units = (total + unit - 1) / unit;
    *first = units * id / threads * unit;
    *last = units * (id + 1) / threads * unit;
    if (*last > total) *last = total;
    if (*first > total) *first = total;
}
