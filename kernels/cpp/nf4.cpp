// kernels/nf4_dequant.py and kernels/nf4_quantize.py: NF4 weights in bitsandbytes' format.
#include "common.h"
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

static const float NF4[16] = {
    -1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f};

static inline int log2_of(i64 power) {
    int shift = 0;
    while ((i64)1 << shift < power) shift++;
    return shift;
}

// The scale of a block; the product is rounded before the sum (volatile: no fused multiply-add).
struct Scales {
    const void* absmax;
    const float *code2, *absmax2, *offset;
    int shift2;
    float operator()(i64 block) const {
        if (!code2) return ((const float*)absmax)[block];
        volatile float product = code2[((const uint8_t*)absmax)[block]] * absmax2[block >> shift2];
        return product + *offset;
    }
};

// The 16 values that a block can have, and 16 bytes -> 32 of them.
template <class T> struct Table {
    T values[16];
    explicit Table(float scale) {
        for (int i = 0; i < 16; i++) values[i] = from_float<T>(NF4[i] * scale);
    }
    void decode32(const uint8_t* packed, T* out) const {
        for (int i = 0; i < 16; i++) {
            out[2 * i] = values[packed[i] >> 4];
            out[2 * i + 1] = values[packed[i] & 15];
        }
    }
};
#ifdef __AVX512BW__
// 16 bytes -> 32 words whose low four bits are the nibbles in order; the tables ignore the higher ones.
static inline __m512i nibbles(const uint8_t* packed) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
    return _mm512_or_si512(_mm512_slli_epi32(bytes, 16), _mm512_srli_epi32(bytes, 4));
}
template <> struct Table<float> {
    __m512 values;
    explicit Table(float scale) : values(_mm512_mul_ps(_mm512_loadu_ps(NF4), _mm512_set1_ps(scale))) {}
    void decode32(const uint8_t* packed, float* out) const {
        __m512i index = nibbles(packed);
        __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(index));
        __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(index, 1));
        _mm512_storeu_ps(out, _mm512_permutexvar_ps(low, values));
        _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(high, values));
    }
};
// Twice the same 16 words, so that the index's fifth bit does not matter. Rounded as from_float does it, denormals kept.
template <> struct Table<bf16> {
    __m512i values;
    explicit Table(float scale) {
        __m512 exact = _mm512_mul_ps(_mm512_loadu_ps(NF4), _mm512_set1_ps(scale));
        __m512i bits = _mm512_castps_si512(exact), upper = _mm512_srli_epi32(bits, 16);
        __m512i half = _mm512_add_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
        __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
        __mmask16 is_nan = _mm512_cmp_ps_mask(exact, exact, _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40));
        values = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(rounded));
    }
    void decode32(const uint8_t* packed, bf16* out) const {
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(nibbles(packed), values));
    }
};
#endif

template <class T> static inline T decode_one(const uint8_t* packed, float scale, i64 e) {
    int code = e & 1 ? packed[e >> 1] & 15 : packed[e >> 1] >> 4;
    return from_float<T>(NF4[code] * scale);
}

// Elements [first, last) of one block.
template <class T> static inline void decode_block(const uint8_t* packed, float scale, i64 first, i64 last, T* out) {
    Table<T> table(scale);
    i64 e = first;
    if (e & 1 && e < last) *out++ = decode_one<T>(packed, scale, e++);
    for (; e + 32 <= last; e += 32, out += 32) table.decode32(packed + (e >> 1), out);
    for (; e < last; e++) *out++ = decode_one<T>(packed, scale, e);
}

// `total` elements as rows of `columns`, rows of out `stride` elements apart.
template <class T>
static void nf4_dequant_impl(const uint8_t* packed, Scales scales, T* out, i64 total, i64 columns, i64 stride, i64 blocksize) {
    i64 rows = (total + columns - 1) / columns;
    int shift = log2_of(blocksize);
#pragma omp parallel for schedule(static)
    for (i64 row = 0; row < rows; row++) {
        i64 e = row * columns, end = e + columns < total ? e + columns : total;
        T* to = out + row * stride;
        while (e < end) {
            i64 block = e >> shift, last = (block + 1) << shift;
            if (last > end) last = end;
            decode_block(packed, scales(block), e, last, to);
            to += last - e;
            e = last;
        }
    }
}
EXPORT(nf4_dequant,
       (const uint8_t* packed, const void* absmax, const float* code2, const float* absmax2, const float* offset, T* out,
        i64 total, i64 columns, i64 stride, i64 blocksize, i64 blocksize2),
       (packed, Scales{absmax, code2, absmax2, offset, log2_of(blocksize2)}, out, total, columns, stride, blocksize))

// The codes of n (even) scaled values as n / 2 bytes: a code is the number of boundaries below the value.
static inline void pack(const float* values, const float* boundaries, int n, uint8_t* packed) {
    uint8_t codes[4096];
#pragma omp simd
    for (int i = 0; i < n; i++) {
        int code = 0;
        for (int j = 0; j < 15; j++) code += values[i] > boundaries[j];
        codes[i] = (uint8_t)code;
    }
#pragma omp simd
    for (int i = 0; i < n / 2; i++) packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
}

// Full blocks only. absmax is raised to 1e-38 before its reciprocal is taken.
template <class T>
static void nf4_quantize_impl(const T* w, const float* boundaries, uint8_t* packed, float* absmax, i64 blocks, i64 blocksize) {
#pragma omp parallel for schedule(static)
    for (i64 block = 0; block < blocks; block++) {
        const T* in = w + block * blocksize;
        float values[4096], largest = 0.f;
#pragma omp simd reduction(max : largest)
        for (i64 i = 0; i < blocksize; i++) {
            float x = to_float(in[i]);
            float magnitude = std::fabs(x);
            largest = magnitude > largest ? magnitude : largest;
            values[i] = x;
        }
        absmax[block] = largest;
        float inverse = 1.f / (largest > 1e-38f ? largest : 1e-38f);
#pragma omp simd
        for (i64 i = 0; i < blocksize; i++) values[i] *= inverse;
        pack(values, boundaries, (int)blocksize, packed + block * blocksize / 2);
    }
}
EXPORT(nf4_quantize, (const T* w, const float* boundaries, uint8_t* packed, float* absmax, i64 blocks, i64 blocksize),
       (w, boundaries, packed, absmax, blocks, blocksize))
