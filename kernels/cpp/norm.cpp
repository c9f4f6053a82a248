// kernels/norm.py: residual add + RMS or layer norm + dropped copies in one pass, and its backward in one pass.
// xhat = (h - mean) * rstd,  y = gain * xhat + bias; ROUNDS: xhat is rounded to T before the product.
// Pointers that may be null: residual, h, dy, dh, t, copies, dx, d_gain. A row of zeros or a row nobody reads stands in
// for them, so that there is one loop for all cases.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif
#include <vector>

#include "common.h"

static const i64 BLOCK_ROWS = 32; // rows that share one partial sum of the gradients of gain and bias

// rounded<T> for what arithmetic gives: the NaNs of arithmetic stay NaN without a comparison.
template <class T> static inline float nearest(float x);
template <> inline float nearest<float>(float x) { return x; }
template <> inline float nearest<bf16>(float x) {
    u32 word;
    std::memcpy(&word, &x, 4);
    word = (word + 0x7fffu + ((word >> 16) & 1u)) & 0xffff0000u;
    std::memcpy(&x, &word, 4);
    return x;
}
// from_float for a value that T holds exactly.
template <class T> static inline T narrowed(float x);
template <> inline float narrowed<float>(float x) { return x; }
template <> inline bf16 narrowed<bf16>(float x) {
    u32 word;
    std::memcpy(&word, &x, 4);
    return bf16{(u16)(word >> 16)};
}
template <int LANE, bool DROPS> static inline bool is_kept(u32 bits, u32 dropped) {
    return !DROPS || ((bits >> (10 * LANE)) & 1023u) >= dropped;
}
template <class T> static inline T* row_of(T* first, i64 m, i64 stride, T* instead) {
    return first ? first + m * stride : instead;
}

template <class T> struct Lanes {
    T* row[3];
};
template <class T> static inline Lanes<T> lanes_of(T* first, i64 lanes, i64 m, i64 M, i64 K, T* instead) {
    Lanes<T> found;
    for (i64 j = 0; j < 3; j++) found.row[j] = first && j < lanes ? first + (j * M + m) * K : instead;
    return found;
}

// wide = x + residual, rounded into h; or x.
template <class T> static void add_row(const T* x, const T* residual, T* h, float* wide, i64 K) {
    if (!residual) {
#pragma omp simd
        for (i64 k = 0; k < K; k++) wide[k] = to_float(x[k]);
        return;
    }
#pragma omp simd
    for (i64 k = 0; k < K; k++) {
        wide[k] = nearest<T>(to_float(x[k]) + to_float(residual[k]));
        h[k] = narrowed<T>(wide[k]);
    }
}

// The mean of a row (0 where not centered); the inverse deviation through rstd.
static float statistics(const float* wide, i64 K, float eps, bool centered, float* rstd) {
    float mean = 0.f, squares = 0.f;
    if (centered) {
#pragma omp simd reduction(+ : mean)
        for (i64 k = 0; k < K; k++) mean += wide[k];
        mean /= (float)K;
    }
#pragma omp simd reduction(+ : squares)
    for (i64 k = 0; k < K; k++) squares += (wide[k] - mean) * (wide[k] - mean);
    *rstd = 1.f / std::sqrt(squares / (float)K + eps);
    return mean;
}

template <class T, int LANES, bool DROPS, bool ROUNDS>
static void scale_row(const float* wide, float mean, float rstd, const float* gain, const float* bias, T* y, Lanes<T> copies,
                      i64 K, u32 key, u32 dropped) {
    T *c0 = copies.row[0], *c1 = copies.row[1], *c2 = copies.row[2];
#pragma omp simd
    for (i64 k = 0; k < K; k++) {
        float xhat = (wide[k] - mean) * rstd;
        float value = nearest<T>(gain[k] * (ROUNDS ? nearest<T>(xhat) : xhat) + bias[k]);
        y[k] = narrowed<T>(value);
        u32 bits = DROPS ? mask_bits(key, k) : 0u;
        if (LANES > 0) c0[k] = narrowed<T>(is_kept<0, DROPS>(bits, dropped) ? value : 0.f);
        if (LANES > 1) c1[k] = narrowed<T>(is_kept<1, DROPS>(bits, dropped) ? value : 0.f);
        if (LANES > 2) c2[k] = narrowed<T>(is_kept<2, DROPS>(bits, dropped) ? value : 0.f);
    }
}

template <class T>
static void norm_forward_impl(const T* x, i64 stride_x, const T* residual, i64 stride_r, T* h, const float* gain,
                              const float* bias, T* y, T* copies, float* rstd, float* mean, i64 M, i64 K, float eps,
                              i64 rounds, i64 centered, i64 lanes, i64 seed, i64 dropped) {
    auto scale = rounds ? scale_row<T, 0, false, true> : scale_row<T, 0, false, false>;
    if (lanes == 1) scale = rounds ? scale_row<T, 1, true, true> : scale_row<T, 1, true, false>;
    if (lanes == 2) scale = rounds ? scale_row<T, 2, true, true> : scale_row<T, 2, true, false>;
    if (lanes == 3) scale = rounds ? scale_row<T, 3, true, true> : scale_row<T, 3, true, false>;
#pragma omp parallel
    {
        std::vector<float> wide(K);
        std::vector<T> unread(K);
#pragma omp for schedule(static)
        for (i64 m = 0; m < M; m++) {
            const T* other = row_of(residual, m, stride_r, (const T*)nullptr);
            add_row(x + m * stride_x, other, row_of(h, m, K, (T*)nullptr), wide.data(), K);
            float center = statistics(wide.data(), K, eps, centered, rstd + m);
            if (centered) mean[m] = center;
            scale(wide.data(), center, rstd[m], gain, bias, y + m * K, lanes_of(copies, lanes, m, M, K, unread.data()), K,
                  row_key(m, seed), (u32)dropped);
        }
    }
}
EXPORT(norm_forward,
       (const T* x, i64 stride_x, const T* residual, i64 stride_r, T* h, const float* gain, const float* bias, T* y,
        T* copies, float* rstd, float* mean, i64 M, i64 K, float eps, i64 rounds, i64 centered, i64 lanes, i64 seed,
        i64 dropped),
       (x, stride_x, residual, stride_r, h, gain, bias, y, copies, rstd, mean, M, K, eps, rounds, centered, lanes, seed,
        dropped))

// Row buffers of one thread.
struct Row {
    std::vector<float> grad, xhat;
    explicit Row(i64 K) : grad(K), xhat(K) {}
};
struct Sums {
    float grad, product; // sums of gain * grad and gain * grad * xhat
};

// grad = dy + kept t; the dropped copies of y take the place of t.
template <class T, int LANES, bool DROPS, bool ROUNDS>
static Sums expand_row(const T* dy, Lanes<T> t, Lanes<T> copies, const T* h, float mean, float rstd, const float* gain,
                       const float* bias, Row& row, i64 K, u32 key, u32 dropped) {
    float *grad = row.grad.data(), *wide = row.xhat.data(), sum = 0.f, product = 0.f;
    const T *t0 = t.row[0], *t1 = t.row[1], *t2 = t.row[2];
    T *c0 = copies.row[0], *c1 = copies.row[1], *c2 = copies.row[2];
#pragma omp simd reduction(+ : sum, product)
    for (i64 k = 0; k < K; k++) {
        float xhat = (to_float(h[k]) - mean) * rstd;
        float g = to_float(dy[k]);
        if (LANES > 0) {
            float value = nearest<T>(gain[k] * (ROUNDS ? nearest<T>(xhat) : xhat) + bias[k]);
            u32 bits = DROPS ? mask_bits(key, k) : 0u;
            bool kept = is_kept<0, DROPS>(bits, dropped);
            g += kept ? to_float(t0[k]) : 0.f;
            c0[k] = narrowed<T>(kept ? value : 0.f);
            if (LANES > 1) {
                kept = is_kept<1, DROPS>(bits, dropped);
                g += kept ? to_float(t1[k]) : 0.f;
                c1[k] = narrowed<T>(kept ? value : 0.f);
            }
            if (LANES > 2) {
                kept = is_kept<2, DROPS>(bits, dropped);
                g += kept ? to_float(t2[k]) : 0.f;
                c2[k] = narrowed<T>(kept ? value : 0.f);
            }
        }
        grad[k] = g;
        wide[k] = xhat;
        sum += g * gain[k];
        product += g * gain[k] * xhat;
    }
    return Sums{sum, product};
}

// dx = factor * (gain * grad - mean(gain * grad) - xhat * mean(gain * grad * xhat)) + dh
template <class T>
static void contract_row(const Row& row, Sums sums, float factor, const float* gain, const T* dh, T* dx, i64 K) {
    const float *grad = row.grad.data(), *xhat = row.xhat.data();
    float shift = sums.grad / (float)K, slope = sums.product / (float)K;
#pragma omp simd
    for (i64 k = 0; k < K; k++)
        dx[k] = narrowed<T>(nearest<T>(factor * (grad[k] * gain[k] - shift - xhat[k] * slope) + to_float(dh[k])));
}

template <class T> static void sum_row(const Row& row, bool rounds, float* d_gain, float* d_bias, i64 K) {
    const float *grad = row.grad.data(), *xhat = row.xhat.data();
    if (rounds) {
#pragma omp simd
        for (i64 k = 0; k < K; k++) d_gain[k] += grad[k] * nearest<T>(xhat[k]);
    } else {
#pragma omp simd
        for (i64 k = 0; k < K; k++) d_gain[k] += grad[k] * xhat[k];
    }
#pragma omp simd
    for (i64 k = 0; k < K; k++) d_bias[k] += grad[k];
}

// With `scaled` dy holds rstd * dy. t and copies may be the same memory. d_gain and d_bias are partial sums
// [ceil(M / BLOCK_ROWS), K], zero at the start.
template <class T>
static void norm_backward_impl(const T* dy, i64 stride_dy, const T* dh, i64 stride_dh, const T* h, i64 stride_h,
                               const float* gain, const float* bias, const float* rstd, const float* mean, T* t, T* copies,
                               T* dx, float* d_gain, float* d_bias, i64 M, i64 K, i64 rounds, i64 lanes, i64 seed,
                               i64 dropped, i64 scaled) {
    auto expand = rounds ? expand_row<T, 0, false, true> : expand_row<T, 0, false, false>;
    if (lanes == 1 && !dropped) expand = rounds ? expand_row<T, 1, false, true> : expand_row<T, 1, false, false>;
    if (lanes == 1 && dropped) expand = rounds ? expand_row<T, 1, true, true> : expand_row<T, 1, true, false>;
    if (lanes == 2) expand = rounds ? expand_row<T, 2, true, true> : expand_row<T, 2, true, false>;
    if (lanes == 3) expand = rounds ? expand_row<T, 3, true, true> : expand_row<T, 3, true, false>;
    std::vector<T> zeros(K);
#pragma omp parallel
    {
        Row row(K);
        std::vector<T> unread(K);
#pragma omp for schedule(static)
        for (i64 block = 0; block < (M + BLOCK_ROWS - 1) / BLOCK_ROWS; block++) {
            i64 end = (block + 1) * BLOCK_ROWS < M ? (block + 1) * BLOCK_ROWS : M;
            for (i64 m = block * BLOCK_ROWS; m < end; m++) {
                Sums sums = expand(row_of(dy, m, stride_dy, (const T*)zeros.data()),
                                   lanes_of(t, lanes, m, M, K, zeros.data()),
                                   lanes_of(copies, lanes, m, M, K, unread.data()), h + m * stride_h, mean ? mean[m] : 0.f,
                                   rstd[m], gain, bias, row, K, row_key(m, seed), (u32)dropped);
                if (!mean) sums.grad = 0.f;
                if (d_gain) sum_row<T>(row, rounds, d_gain + block * K, d_bias + block * K, K);
                const T* add = row_of(dh, m, stride_dh, (const T*)zeros.data());
                if (dx) contract_row<T>(row, sums, scaled ? 1.f : rstd[m], gain, add, dx + m * K, K);
            }
        }
    }
}
EXPORT(norm_backward,
       (const T* dy, i64 stride_dy, const T* dh, i64 stride_dh, const T* h, i64 stride_h, const float* gain,
        const float* bias, const float* rstd, const float* mean, T* t, T* copies, T* dx, float* d_gain, float* d_bias,
        i64 M, i64 K, i64 rounds, i64 lanes, i64 seed, i64 dropped, i64 scaled),
       (dy, stride_dy, dh, stride_dh, h, stride_h, gain, bias, rstd, mean, t, copies, dx, d_gain, d_bias, M, K, rounds,
        lanes, seed, dropped, scaled))

// out [M, K] = rstd * dy; zero where there is no dy.
template <class T> static void norm_scale_impl(const T* dy, i64 stride, const float* rstd, T* out, i64 M, i64 K) {
    const std::vector<T> zeros(dy ? 0 : K);
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++) {
        const T* in = row_of(dy, m, stride, zeros.data());
        T* row = out + m * K;
#pragma omp simd
        for (i64 k = 0; k < K; k++) row[k] = narrowed<T>(nearest<T>(rstd[m] * to_float(in[k])));
    }
}
EXPORT(norm_scale, (const T* dy, i64 stride, const float* rstd, T* out, i64 M, i64 K), (dy, stride, rstd, out, M, K))
