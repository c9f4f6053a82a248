// kernels/glu.py: h = act(gate) * up with its dropped copies, and the gradients of gate and up.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif
#include "common.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// Every activation is x * weight(x); slope is its derivative.
enum Kind : i64 { SIGMOID = 0, NORMAL = 1, STEP = 2 };
constexpr i64 CHUNK = 256;

struct Gate {
    float value, slope;
};

// 1 / d within 1 ulp for d in [1, 2^126], without the slow division: three Newton steps from a guess of the exponent.
// 1 / 1 is exactly 1.
static inline float inverse(float d) {
    u32 word;
    std::memcpy(&word, &d, 4);
    word = 0x7ef311c3u - word;
    float r;
    std::memcpy(&r, &word, 4);
    r = r * (2.f - d * r);
    r = r * (2.f - d * r);
    return r + r * std::fmaf(-d, r, 1.f);
}

// weight = sigmoid(x * (c1 + c3 * x^2)): silu, quick_gelu and gelu_tanh. Far beyond saturation the numbers are capped, so
// that no product of a huge x with a tiny weight is left.
static inline Gate sigmoid_gate(float x, float c1, float c3) {
    float near = x > 100.f ? 100.f : x;
    near = near < -100.f ? -100.f : near;
    float square = near * near;
    float z = -near * (c1 + c3 * square);
    float e = exp_fast(z);
    float s = z > 87.f ? 0.f : inverse(1.f + e);
    return {x * s, s * (1.f + near * (c1 + 3.f * c3 * square) * (e * s))};
}

// weight = the normal distribution function, 1 - tail(x) with tail(x) = tail(-x) for x < 0 and, for x >= 0,
// tail = exp(-x^2/2) * t * polynomial(t), t = 1 / (1 + x / sqrt(8)): relative error 1e-7, fitted over [0, 14].
static inline Gate normal_gate(float x) {
    float size = std::fabs(x);
    float near = size > 13.f ? 13.f : size;
    float e = size > 13.f ? 0.f : exp_fast(-0.5f * near * near);
    float t = inverse(1.f + 0.35355339f * near);
    float p = -2.953419906e-2f;
    p = p * t + 1.422862982e-1f;
    p = p * t - 2.435978739e-1f;
    p = p * t + 1.390316166e-1f;
    p = p * t - 1.331174861e-2f;
    p = p * t + 1.013430821e-1f;
    p = p * t + 1.215519457e-1f;
    p = p * t + 1.411876485e-1f;
    p = p * t + 1.410432091e-1f;
    float tail = e * t * p;
    float weight = x < 0.f ? tail : 1.f - tail;
    return {x * weight, weight + near * (x < 0.f ? -0.39894228f : 0.39894228f) * e};
}

template <i64 KIND> static inline Gate gate_of(float x, float c1, float c3) {
    if (KIND == SIGMOID) return sigmoid_gate(x, c1, c3);
    if (KIND == NORMAL) return normal_gate(x);
    return {x < 0.f ? 0.f : x, x > 0.f ? 1.f : 0.f};
}

// The value after a trip through T. Unlike `rounded` it takes no care of NaNs whose low half has bits: what is computed
// from bf16 numbers has none.
template <class T> static inline float between(float x) { return x; }
template <> inline float between<bf16>(float x) {
    u32 word;
    std::memcpy(&word, &x, 4);
    word = (word + 0x7fffu + ((word >> 16) & 1u)) & 0xffff0000u;
    std::memcpy(&x, &word, 4);
    return x;
}

template <class T> static inline void store(const float* from, T* to, i64 n) {
#pragma omp simd
    for (i64 k = 0; k < n; k++) to[k] = from_float<T>(from[k]);
}
#ifdef __AVX512BF16__
template <> inline void store<bf16>(const float* from, bf16* to, i64 n) {
    for (i64 k = 0; k < n; k += 16) {
        __mmask16 inside = n - k >= 16 ? 0xffff : (__mmask16)((1u << (n - k)) - 1);
        _mm256_mask_storeu_epi16(to + k, inside, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, from + k)));
    }
}
#endif

// masks[lane] = keep factors of columns [from, from + n) of a row.
static inline void keep_factors(float (*masks)[CHUNK], u32 key, i64 from, i64 n, i64 lanes, u32 dropped, float scale) {
    for (i64 lane = 0; lane < lanes; lane++) {
        float* mask = masks[lane];
#pragma omp simd
        for (i64 k = 0; k < n; k++) mask[k] = keep(mask_bits(key, from + k), (int)lane, dropped, scale);
    }
}

// h dropped by the mask of each lane, copies of the lanes are `stride` apart.
template <class T>
static inline void store_copies(const float* h, T* copies, i64 stride, const float (*masks)[CHUNK], i64 n, i64 lanes) {
    float product[CHUNK];
    for (i64 lane = 0; lane < lanes; lane++) {
        const float* mask = masks[lane];
#pragma omp simd
        for (i64 k = 0; k < n; k++) product[k] = h[k] * mask[k];
        store(product, copies + lane * stride, n);
    }
}

// gate, up: M rows of F that are gate_stride and up_stride apart, up may be null. h [M, F]; copies [lanes, M, F].
template <class T, i64 KIND>
static void forward_of(const T* gate, i64 gate_stride, const T* up, i64 up_stride, T* h, T* copies, i64 M, i64 F, float c1, float c3,
                       i64 lanes, i64 seed, u32 dropped, float scale) {
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++) {
        u32 key = row_key(m, seed);
        float masks[3][CHUNK], row[CHUNK];
        for (i64 from = 0; from < F; from += CHUNK) {
            i64 n = F - from < CHUNK ? F - from : CHUNK;
            const T* g = gate + m * gate_stride + from;
            T* out = h + m * F + from;
            if (up) {
                const T* u = up + m * up_stride + from;
#pragma omp simd
                for (i64 k = 0; k < n; k++) {
                    row[k] = between<T>(gate_of<KIND>(to_float(g[k]), c1, c3).value) * to_float(u[k]);
                }
            } else {
#pragma omp simd
                for (i64 k = 0; k < n; k++) {
                    row[k] = gate_of<KIND>(to_float(g[k]), c1, c3).value;
                }
            }
            store(row, out, n);
            keep_factors(masks, key, from, n, lanes, dropped, scale);
            store_copies(row, copies + m * F + from, M * F, masks, n, lanes);
        }
    }
}

template <class T>
static void glu_impl(const T* gate, i64 gate_stride, const T* up, i64 up_stride, T* h, T* copies, i64 M, i64 F, i64 kind, float c1, float c3,
                     i64 lanes, i64 seed, i64 dropped, float scale) {
    auto run = kind == SIGMOID ? forward_of<T, SIGMOID> : kind == NORMAL ? forward_of<T, NORMAL> : forward_of<T, STEP>;
    run(gate, gate_stride, up, up_stride, h, copies, M, F, c1, c3, lanes, seed, (u32)dropped, scale);
}
EXPORT(glu, (const T* gate, i64 gate_stride, const T* up, i64 up_stride, T* h, T* copies, i64 M, i64 F, i64 kind, float c1, float c3, i64 lanes, i64 seed, i64 dropped, float scale),
       (gate, gate_stride, up, up_stride, h, copies, M, F, kind, c1, c3, lanes, seed, dropped, scale))

// d = dh + sum over lanes of mask * expanded; d_gate and d_up (rows d_stride apart, either may be null), and h dropped anew
// in copies. dh rows are dh_stride apart; dh, expanded [lanes, M, F] and copies [lanes, M, F] may be null.
template <class T, i64 KIND>
static void backward_of(const T* dh, i64 dh_stride, const T* expanded, const T* gate, i64 gate_stride, const T* up, i64 up_stride, T* d_gate,
                        T* d_up, i64 d_stride, T* copies, i64 M, i64 F, float c1, float c3, i64 lanes, i64 seed, u32 dropped, float scale) {
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++) {
        u32 key = row_key(m, seed);
        float masks[3][CHUNK], d[CHUNK], a[CHUNK], slope[CHUNK], u[CHUNK];
        for (i64 from = 0; from < F; from += CHUNK) {
            i64 n = F - from < CHUNK ? F - from : CHUNK;
            const T* g = gate + m * gate_stride + from;
            keep_factors(masks, key, from, n, lanes, dropped, scale);
            for (i64 k = 0; k < n; k++) d[k] = dh ? to_float(dh[m * dh_stride + from + k]) : 0.f;
            for (i64 lane = 0; expanded && lane < lanes; lane++) {
                const T* t = expanded + (lane * M + m) * F + from;
                const float* mask = masks[lane];
#pragma omp simd
                for (i64 k = 0; k < n; k++) d[k] += to_float(t[k]) * mask[k];
            }
#pragma omp simd
            for (i64 k = 0; k < n; k++) {
                Gate value = gate_of<KIND>(to_float(g[k]), c1, c3);
                a[k] = value.value;
                slope[k] = value.slope;
            }
            for (i64 k = 0; k < n; k++) u[k] = up ? to_float(up[m * up_stride + from + k]) : 1.f;
            if (d_gate) {
#pragma omp simd
                for (i64 k = 0; k < n; k++) slope[k] *= d[k] * u[k];
                store(slope, d_gate + m * d_stride + from, n);
            }
            if (d_up) {
#pragma omp simd
                for (i64 k = 0; k < n; k++) d[k] *= a[k];
                store(d, d_up + m * d_stride + from, n);
            }
            if (!copies) continue;
#pragma omp simd
            for (i64 k = 0; k < n; k++) a[k] = between<T>(a[k]) * u[k];
            store_copies(a, copies + m * F + from, M * F, masks, n, lanes);
        }
    }
}

template <class T>
static void glu_backward_impl(const T* dh, i64 dh_stride, const T* expanded, const T* gate, i64 gate_stride, const T* up, i64 up_stride,
                              T* d_gate, T* d_up, i64 d_stride, T* copies, i64 M, i64 F, i64 kind, float c1, float c3, i64 lanes, i64 seed,
                              i64 dropped, float scale) {
    auto run = kind == SIGMOID ? backward_of<T, SIGMOID> : kind == NORMAL ? backward_of<T, NORMAL> : backward_of<T, STEP>;
    run(dh, dh_stride, expanded, gate, gate_stride, up, up_stride, d_gate, d_up, d_stride, copies, M, F, c1, c3, lanes, seed, (u32)dropped,
        scale);
}
EXPORT(glu_backward, (const T* dh, i64 dh_stride, const T* expanded, const T* gate, i64 gate_stride, const T* up, i64 up_stride, T* d_gate, T* d_up, i64 d_stride, T* copies, i64 M, i64 F, i64 kind, float c1, float c3, i64 lanes, i64 seed, i64 dropped, float scale),
       (dh, dh_stride, expanded, gate, gate_stride, up, up_stride, d_gate, d_up, d_stride, copies, M, F, kind, c1, c3, lanes, seed, dropped, scale))
