// What all CPU kernels share: bf16, a vectorisable exp, the dropout hash (kernels/shrink.py), entry points per dtype.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

using i64 = int64_t;
using u32 = uint32_t;
using u16 = uint16_t;

struct bf16 {
    u16 bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    u32 word = (u32)x.bits << 16;
    float result;
    std::memcpy(&result, &word, 4);
    return result;
}

// Round to nearest even; a NaN stays a NaN.
template <class T> static inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
    u32 word;
    std::memcpy(&word, &x, 4);
    u32 rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    u32 quiet = (word >> 16) | 0x40u;
    return bf16{(u16)((word & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}
// The value after a trip through T: where PyTorch rounds between two operations.
template <class T> static inline float rounded(float x) { return to_float(from_float<T>(x)); }

// exp with 2 ulp on [-87, 88], clamped outside; written so that a compiler vectorises it. NaN gives a NaN.
static inline float exp_fast(float x) {
    float clamped = x < -87.f ? -87.f : x;
    clamped = clamped > 88.f ? 88.f : clamped;
    float scaled = clamped * 1.44269504f;
    float whole = std::nearbyintf(scaled);
    float f = std::fmaf(clamped, 1.44269504f, -whole);
    f = std::fmaf(clamped, 1.925963033e-8f, f);
    float p = 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.f;
    int32_t power = ((int32_t)whole + 127) << 23;
    float two;
    std::memcpy(&two, &power, 4);
    return p * two + (x - x);
}

static inline u32 mix32(u32 x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}
static inline u32 row_key(i64 row, i64 seed) { return mix32(mix32((u32)row + (u32)seed) ^ (u32)((uint64_t)seed >> 32)); }
static inline u32 mask_bits(u32 key, i64 col) { return mix32(key ^ ((u32)col * 0x9e3779b1u)); }
// scale where the lane keeps the value, else 0; dropped = threshold(p).
static inline float keep(u32 bits, int lane, u32 dropped, float scale) {
    return ((bits >> (10 * lane)) & 1023u) >= dropped ? scale : 0.f;
}

// EXPORT(name, (T* x, i64 n), (x, n)) makes name_bf16 and name_fp32 of template <class T> void name_impl(T* x, i64 n).
#define EXPORT(NAME, PARAMETERS, ARGUMENTS)                                                                            \
    namespace for_bf16 {                                                                                               \
    using T = bf16;                                                                                                    \
    extern "C" void NAME##_bf16 PARAMETERS { NAME##_impl<T> ARGUMENTS; }                                               \
    }                                                                                                                  \
    namespace for_fp32 {                                                                                               \
    using T = float;                                                                                                   \
    extern "C" void NAME##_fp32 PARAMETERS { NAME##_impl<T> ARGUMENTS; }                                               \
    }
