// kernels/rope.py: rotates pairs of features of the first heads; x and y may be one and the same.
#include "common.h"
#include <cstring>

// One row of the table as floats; its entries are `step` apart.
template <class C> static inline void load_row(const C* table, float* out, i64 half, i64 step, float factor) {
    for (i64 j = 0; j < half; j++) out[j] = to_float(table[j * step]) * factor;
}

template <class T> static inline void rotate_halves(const T* x, T* y, const float* c, const float* s, i64 half) {
#pragma omp simd
    for (i64 j = 0; j < half; j++) {
        float a = to_float(x[j]), b = to_float(x[j + half]);
        y[j] = from_float<T>(a * c[j] - b * s[j]);
        y[j + half] = from_float<T>(b * c[j] + a * s[j]);
    }
}

template <class T> static inline void rotate_pairs(const T* x, T* y, const float* c, const float* s, i64 half) {
#pragma omp simd
    for (i64 j = 0; j < half; j++) {
        float a = to_float(x[2 * j]), b = to_float(x[2 * j + 1]);
        y[2 * j] = from_float<T>(a * c[j] - b * s[j]);
        y[2 * j + 1] = from_float<T>(b * c[j] + a * s[j]);
    }
}

constexpr i64 MAX_HALF = 512;

// x, y [B, S, H, D]: strides of the first three dimensions; cos, sin [B, S, 2 * half] of T, or of float where is_wide.
template <class T>
static void rope_impl(const T* x, T* y, const void* cos, const void* sin, const i64* sizes, const i64* strides, i64 is_wide, i64 is_paired, float sign) {
    i64 B = sizes[0], S = sizes[1], H = sizes[2], D = sizes[3], heads = sizes[4], half = sizes[5];
    i64 step = is_paired ? 2 : 1;
#pragma omp parallel for schedule(static)
    for (i64 row = 0; row < B * S; row++) {
        i64 b = row / S, t = row % S;
        float c[MAX_HALF], s[MAX_HALF];
        i64 c_at = b * strides[6] + t * strides[7], s_at = b * strides[8] + t * strides[9];
        if (is_wide) {
            load_row((const float*)cos + c_at, c, half, step, 1.f);
            load_row((const float*)sin + s_at, s, half, step, sign);
        } else {
            load_row((const T*)cos + c_at, c, half, step, 1.f);
            load_row((const T*)sin + s_at, s, half, step, sign);
        }
        const T* from = x + b * strides[0] + t * strides[1];
        T* to = y + b * strides[3] + t * strides[4];
        for (i64 h = 0; h < H; h++, from += strides[2], to += strides[5]) {
            i64 done = 0;
            if (h < heads) {
                if (is_paired) rotate_pairs(from, to, c, s, half);
                else rotate_halves(from, to, c, s, half);
                done = 2 * half;
            }
            if (from != to) std::memcpy(to + done, from + done, (D - done) * sizeof(T));
        }
    }
}
EXPORT(rope, (const T* x, T* y, const void* cos, const void* sin, const i64* sizes, const i64* strides, i64 is_wide, i64 is_paired, float sign),
       (x, y, cos, sin, sizes, strides, is_wide, is_paired, sign))
