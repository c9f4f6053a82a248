// kernels/dora.py: the scaling of a linear's columns and its backward.
#include "common.h"

// out [M, N] = g * u + bias (+ added); bias and added may be null, added may be out.
template <class T>
static void dora_scale_impl(const T* u, const float* g, const float* bias, const T* added, T* out, i64 M, i64 N) {
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++) {
        const T *in = u + m * N, *more = added + m * N;
        T* y = out + m * N;
        if (added && bias) {
#pragma omp simd
            for (i64 n = 0; n < N; n++) y[n] = from_float<T>(to_float(in[n]) * g[n] + bias[n] + to_float(more[n]));
        } else if (added) {
#pragma omp simd
            for (i64 n = 0; n < N; n++) y[n] = from_float<T>(to_float(in[n]) * g[n] + to_float(more[n]));
        } else if (bias) {
#pragma omp simd
            for (i64 n = 0; n < N; n++) y[n] = from_float<T>(to_float(in[n]) * g[n] + bias[n]);
        } else {
#pragma omp simd
            for (i64 n = 0; n < N; n++) y[n] = from_float<T>(to_float(in[n]) * g[n]);
        }
    }
}
EXPORT(dora_scale, (const T* u, const float* g, const float* bias, const T* added, T* out, i64 M, i64 N),
       (u, g, bias, added, out, M, N))

// du [M, N] = g * dy, rows of dy `stride` apart; sums [N] = column sums of dy * u where u is given. A thread owns columns,
// so the order of a sum does not depend on their number.
template <class T>
static void dora_scale_backward_impl(const T* dy, const T* u, const float* g, T* du, float* sums, i64 M, i64 N, i64 stride) {
    const i64 WIDTH = 64;
#pragma omp parallel for schedule(static)
    for (i64 first = 0; first < N; first += WIDTH) {
        i64 width = N - first < WIDTH ? N - first : WIDTH;
        float total[WIDTH] = {0.f};
        for (i64 m = 0; m < M; m++) {
            const T* in = dy + m * stride + first;
            T* out = du + m * N + first;
            if (u) {
                const T* with = u + m * N + first;
#pragma omp simd
                for (i64 n = 0; n < width; n++) total[n] += to_float(in[n]) * to_float(with[n]);
            }
#pragma omp simd
            for (i64 n = 0; n < width; n++) out[n] = from_float<T>(to_float(in[n]) * g[first + n]);
        }
        if (u) std::memcpy(sums + first, total, width * sizeof(float));
    }
}
EXPORT(dora_scale_backward, (const T* dy, const T* u, const float* g, T* du, float* sums, i64 M, i64 N, i64 stride),
       (dy, u, g, du, sums, M, N, stride))
