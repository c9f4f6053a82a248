// kernels/dora.py: the scaling of a linear's columns and its backward, and the products that a norm of rows needs.
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

// p [N, R] = W A^T and squares [N] = ||W||^2 (may be null), rows of W `stride` apart, A [R, K] in fp32. A row of W is
// converted a piece at a time, for four rows together.
template <class T>
static void dora_rows_impl(const T* w, const float* a, float* p, float* squares, i64 N, i64 K, i64 R, i64 stride) {
    const i64 ROWS = 4, PIECE = 512;
#pragma omp parallel for schedule(static)
    for (i64 first = 0; first < N; first += ROWS) {
        i64 rows = N - first < ROWS ? N - first : ROWS;
        float piece[ROWS][PIECE], square[ROWS] = {0.f};
        for (i64 i = 0; i < rows * R; i++) p[first * R + i] = 0.f;
        for (i64 start = 0; start < K; start += PIECE) {
            i64 length = K - start < PIECE ? K - start : PIECE;
            for (i64 i = 0; i < ROWS; i++) {
                const T* in = w + (first + (i < rows ? i : 0)) * stride + start;
                float sum = 0.f;
#pragma omp simd reduction(+ : sum)
                for (i64 k = 0; k < length; k++) {
                    float x = to_float(in[k]);
                    piece[i][k] = x;
                    sum += x * x;
                }
                square[i] += sum;
            }
            for (i64 r = 0; r < R; r++) {
                const float* other = a + r * K + start;
                float s0 = 0.f, s1 = 0.f, s2 = 0.f, s3 = 0.f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
                for (i64 k = 0; k < length; k++) {
                    s0 += piece[0][k] * other[k];
                    s1 += piece[1][k] * other[k];
                    s2 += piece[2][k] * other[k];
                    s3 += piece[3][k] * other[k];
                }
                float sums[ROWS] = {s0, s1, s2, s3};
                for (i64 i = 0; i < rows; i++) p[(first + i) * R + r] += sums[i];
            }
        }
        for (i64 i = 0; squares && i < rows; i++) squares[first + i] = square[i];
    }
}
EXPORT(dora_rows, (const T* w, const float* a, float* p, float* squares, i64 N, i64 K, i64 R, i64 stride),
       (w, a, p, squares, N, K, R, stride))
