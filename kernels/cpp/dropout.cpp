// kernels/dropout.py: y [M, K] contiguous = mask * x, rows of x are `stride` elements apart.
#include "common.h"

template <class T> static void dropout_impl(const T* x, T* y, i64 M, i64 K, i64 stride, i64 seed, i64 dropped, float scale) {
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++) {
        const T* in = x + m * stride;
        T* out = y + m * K;
        u32 key = row_key(m, seed);
#pragma omp simd
        for (i64 k = 0; k < K; k++) out[k] = from_float<T>(to_float(in[k]) * keep(mask_bits(key, k), 0, (u32)dropped, scale));
    }
}
EXPORT(dropout, (const T* x, T* y, i64 M, i64 K, i64 stride, i64 seed, i64 dropped, float scale), (x, y, M, K, stride, seed, dropped, scale))
