// kernels/lora_linear.py and lora_grads.py on the CPU: everything of a low-rank update but the base product.
// The dropout copies and the masked addition exist for every processor; with AMX tiles (bf16) the skinny products are
// here too, fused with the masks, so that x, y and dy are read once.
#include "common.h"
#include <omp.h>

// out [J, M, K] = mask_j * x, one hash per element for up to three lanes.
template <class T>
static void lora_drop_impl(const T* x, i64 ldx, T* out, i64 J, i64 M, i64 K, i64 seed, i64 dropped, float scale) {
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++) {
        const T* in = x + m * ldx;
        u32 key = row_key(m, seed), least = (u32)dropped;
        T *y0 = out + m * K, *y1 = y0 + (J > 1 ? M * K : 0), *y2 = y0 + (J > 2 ? 2 * M * K : 0);
        if (J == 1) {
#pragma omp simd
            for (i64 k = 0; k < K; k++) y0[k] = from_float<T>(to_float(in[k]) * keep(mask_bits(key, k), 0, least, scale));
        } else {
#pragma GCC ivdep
            for (i64 k = 0; k < K; k++) {
                u32 bits = mask_bits(key, k);
                float value = to_float(in[k]);
                if (J > 2) y2[k] = from_float<T>(value * keep(bits, 2, least, scale));
                y1[k] = from_float<T>(value * keep(bits, 1, least, scale));
                y0[k] = from_float<T>(value * keep(bits, 0, least, scale));
            }
        }
    }
}
EXPORT(lora_drop, (const T* x, i64 ldx, T* out, i64 J, i64 M, i64 K, i64 seed, i64 dropped, float scale),
       (x, ldx, out, J, M, K, seed, dropped, scale))

// dx [M, K] += sum_j mask_j * t_j, t [J, M, K].
template <class T>
static void lora_add_masked_impl(const T* t, T* dx, i64 ldx, i64 J, i64 M, i64 K, i64 seed, i64 dropped, float scale) {
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++) {
        T* out = dx + m * ldx;
        u32 key = row_key(m, seed), least = (u32)dropped;
        const T *t0 = t + m * K, *t1 = t0 + (J > 1 ? M * K : 0), *t2 = t0 + (J > 2 ? 2 * M * K : 0);
        float s1 = J > 1 ? scale : 0.f, s2 = J > 2 ? scale : 0.f;
#pragma omp simd
        for (i64 k = 0; k < K; k++) {
            u32 bits = mask_bits(key, k);
            float sum = to_float(t0[k]) * keep(bits, 0, least, scale) + to_float(t1[k]) * keep(bits, 1, least, s1);
            out[k] = from_float<T>(to_float(out[k]) + (sum + to_float(t2[k]) * keep(bits, 2, least, s2)));
        }
    }
}
EXPORT(lora_add_masked, (const T* t, T* dx, i64 ldx, i64 J, i64 M, i64 K, i64 seed, i64 dropped, float scale),
       (t, dx, ldx, J, M, K, seed, dropped, scale))

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__BMI2__) && defined(__linux__)
#include <cstdlib>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// One projection, as Python fills it: addresses (0 = absent), rank, columns [n0, n1) of y, first column of S, and
// whether its gradients are fp32.
struct Row {
    const u16 *a, *b;
    void *da, *db;
    i64 rank, n0, n1, c0, fp32;
};

static inline i64 up(i64 value, i64 multiple) { return (value + multiple - 1) / multiple * multiple; }
static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

// Memory that stays with its thread and grows; aligned to cache lines.
template <int SLOT> static void* scratch(i64 bytes) {
    static thread_local void* memory = nullptr;
    static thread_local i64 size = 0;
    if (size < bytes) {
        std::free(memory);
        size = up(bytes, 4096);
        memory = std::aligned_alloc(4096, size);
    }
    return memory;
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    u16 columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
struct Tiles {
    Tiles() {
        TileConfig config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// c [32, 32] (row stride 32; the second 16 rows only with A2, the second 16 columns only with B2) = sum over steps of
// a [., 32] times a tile pair of b. a0, a1: rows with lda elements between them, 32 columns a step. b: 1 KB tiles of
// pairs (k, k+1) for 16 columns; b1 = b0 + b_second, and b_step elements to the next step.
template <bool A2, bool B2>
static void block(const u16* a0, const u16* a1, i64 lda, i64 a_step, const u16* b, i64 b_second, i64 b_step, i64 steps, float* c,
                  bool adds) {
    if (adds) {
        _tile_loadd(0, c, 128);
        if (B2) _tile_loadd(1, c + 16, 128);
        if (A2) _tile_loadd(2, c + 512, 128);
        if (A2 && B2) _tile_loadd(3, c + 528, 128);
    } else {
        _tile_zero(0);
        if (B2) _tile_zero(1);
        if (A2) _tile_zero(2);
        if (A2 && B2) _tile_zero(3);
    }
    for (i64 i = 0; i < steps; i++) {
        _tile_loadd(4, a0 + i * a_step, lda * 2);
        _tile_loadd(6, b + i * b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (B2) {
            _tile_loadd(7, b + i * b_step + b_second, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (A2) {
            _tile_loadd(5, a1 + i * a_step, lda * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (B2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 128);
    if (B2) _tile_stored(1, c + 16, 128);
    if (A2) _tile_stored(2, c + 512, 128);
    if (A2 && B2) _tile_stored(3, c + 528, 128);
}
static void block(bool a2, bool b2, const u16* a, i64 lda, i64 a_step, const u16* b, i64 b_second, i64 b_step, i64 steps, float* c,
                  bool adds = false) {
    const u16* a1 = a + 16 * lda;
    if (a2 && b2) block<true, true>(a, a1, lda, a_step, b, b_second, b_step, steps, c, adds);
    else if (a2) block<true, false>(a, a1, lda, a_step, b, b_second, b_step, steps, c, adds);
    else if (b2) block<false, true>(a, a1, lda, a_step, b, b_second, b_step, steps, c, adds);
    else block<false, false>(a, a1, lda, a_step, b, b_second, b_step, steps, c, adds);
}

static inline __m512i widen(__m256i v) { return _mm512_cvtepu16_epi32(v); }
static inline __m512 floats(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(widen(v), 16)); }
static inline __m256i halves(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
static inline __mmask16 first16(i64 count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
static inline __mmask32 first32(i64 count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

// Tiles [., 16 pairs, 16 columns] of rows (pairs of rows 2i, 2i+1) of w [rows, columns], rows and columns from 0 beyond
// the end: for products over the rows of w. Tile (i, j) covers rows 32 i.., columns 16 j..; `tiles` columns of tiles.
static void pack_rows(const u16* w, i64 ldw, i64 rows, i64 columns, i64 i, i64 tiles, u16* out) {
    for (i64 j = 0; j < tiles; j++) {
        __mmask16 inside = first16(columns - 16 * j);
        for (i64 pair = 0; pair < 16; pair++) {
            i64 row = 32 * i + 2 * pair;
            __m512i low = row < rows ? widen(_mm256_maskz_loadu_epi16(inside, w + row * ldw + 16 * j)) : _mm512_setzero_si512();
            __m512i high = row + 1 < rows ? widen(_mm256_maskz_loadu_epi16(inside, w + (row + 1) * ldw + 16 * j)) : _mm512_setzero_si512();
            _mm512_store_si512(out + j * 512 + pair * 32, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}
// Tiles of w [columns, depth] for products over depth: pairs of neighbours in a row, transposed. Tile (i, j) covers
// depth 32 i.., rows 16 j.. of w.
static void pack_columns(const u16* w, i64 ldw, i64 depth, i64 columns, i64 i, i64 tiles, u16* out) {
    alignas(64) u32 block[256];
    for (i64 j = 0; j < tiles; j++) {
        for (i64 row = 0; row < 16; row++) {
            __m512i v = _mm512_setzero_si512();
            if (16 * j + row < columns) v = _mm512_maskz_loadu_epi16(first32(depth - 32 * i), w + (16 * j + row) * ldw + 32 * i);
            _mm512_store_si512(block + 16 * row, v);
        }
        const __m512i step = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
        for (i64 pair = 0; pair < 16; pair++)
            _mm512_store_si512(out + j * 512 + pair * 32, _mm512_i32gather_epi32(step, (const int*)block + pair, 4));
    }
}
// out [16 rows up to `columns` rounded, 32] = wᵀ for 32 rows of w [rows, columns]; zeros beyond the ends.
static void transpose32(const u16* w, i64 ldw, i64 rows, i64 columns, u16* out, i64 ldo) {
    for (i64 c = 0; c < up(columns, 16); c++)
        for (i64 r = 0; r < 32; r++) out[c * ldo + r] = r < rows && c < columns ? w[r * ldw + c] : 0;
}

// The dropout mask of 32 columns of a row.
struct Mask {
    __m512i low, high;
    Mask(i64 m, i64 k0, i64 seed) {
        const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        __m512i key = _mm512_set1_epi32((int)row_key(m, seed));
        __m512i column = _mm512_mullo_epi32(_mm512_add_epi32(iota, _mm512_set1_epi32((int)k0)), _mm512_set1_epi32((int)0x9e3779b1u));
        low = mix(_mm512_xor_si512(column, key));
        high = mix(_mm512_xor_si512(_mm512_add_epi32(column, _mm512_set1_epi32((int)(16 * 0x9e3779b1u))), key));
    }
    // Bit k: the lane keeps column k0 + k.
    inline __mmask32 kept(i64 lane, i64 dropped) const {
        __m512i field = _mm512_set1_epi32(1023 << (10 * lane)), bound = _mm512_set1_epi32((int)(dropped << (10 * lane)));
        return _mm512_kunpackw(_mm512_cmpge_epu32_mask(_mm512_and_si512(high, field), bound),
                               _mm512_cmpge_epu32_mask(_mm512_and_si512(low, field), bound));
    }
    static inline __m512i mix(__m512i x) {
        x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7feb352d));
        x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32((int)0x846ca68bu));
        return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    }
};

static void store_row(const float* from, u16* to, i64 count, float scale) {
    for (i64 i = 0; i < count; i += 16) {
        __mmask16 inside = first16(count - i);
        _mm256_mask_storeu_epi16(to + i, inside, halves(_mm512_mul_ps(_mm512_maskz_loadu_ps(inside, from + i), _mm512_set1_ps(scale))));
    }
}

extern "C" void lora_tiles_bf16(i64* ready) {
    *ready = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, the tile data
}

static const i64 SLAB = 256;  // columns of x that are masked at a time: they stay in the first-level cache

// S [M, .] columns of every projection = scale_j * mask_j(x) a_jᵀ.
extern "C" void lora_shrink_bf16(const Row* rows, const float* scales, i64 J, const u16* x, i64 ldx, u16* s, i64 lds, i64 M,
                                 i64 K, i64 seed, i64 dropped) {
    i64 steps = up(K, 32) / 32, at[4] = {0};
    for (i64 j = 0; j < J; j++) at[j + 1] = at[j] + steps * up(rows[j].rank, 16) * 32;
    u16* packed = (u16*)scratch<0>(at[J] * 2);
#pragma omp parallel
    {
        for (i64 j = 0; j < J; j++) {
            i64 tiles = up(rows[j].rank, 16) / 16;
#pragma omp for schedule(static)
            for (i64 i = 0; i < steps; i++) pack_columns(rows[j].a, K, K, rows[j].rank, i, tiles, packed + at[j] + i * tiles * 512);
        }
        Tiles tiles_on;
        i64 lanes = dropped ? J : 1, all = 0;
        for (i64 j = 0; j < J; j++) all += up(rows[j].rank, 32);
        u16* kept = (u16*)scratch<1>(lanes * 32 * SLAB * 2 + 32 * all * 4);
        float* sums = (float*)(kept + lanes * 32 * SLAB);
#pragma omp for schedule(static)
        for (i64 m0 = 0; m0 < M; m0 += 32) {
            i64 height = least(32, M - m0);
            for (i64 k0 = 0; k0 < K; k0 += SLAB) {
                i64 width = least(SLAB, steps * 32 - k0), left = least(SLAB, K - k0);
                const u16* from = x + m0 * ldx + k0;
                bool as_is = !dropped && left == width && height == 32;
                for (i64 m = 0; !as_is && m < 32; m++)
                    for (i64 k = 0; k < width; k += 32) {
                        __mmask32 inside = m < height ? first32(left - k) : 0;
                        u16* to = kept + m * SLAB + k;
                        if (!dropped) {
                            _mm512_store_si512(to, _mm512_maskz_loadu_epi16(inside, from + m * ldx + k));
                            continue;
                        }
                        Mask mask(m0 + m, k0 + k, seed);
                        for (i64 j = 0; j < lanes; j++)
                            _mm512_store_si512(to + j * 32 * SLAB, _mm512_maskz_loadu_epi16(inside & mask.kept(j, dropped), from + m * ldx + k));
                    }
                float* c = sums;
                for (i64 j = 0; j < J; j++) {
                    i64 tiles = up(rows[j].rank, 16) / 16;
                    const u16* a = as_is ? from : kept + (dropped ? j : 0) * 32 * SLAB;
                    for (i64 t = 0; t < tiles; t += 2, c += 1024)
                        block(height > 16, t + 1 < tiles, a, as_is ? ldx : SLAB, 32, packed + at[j] + (k0 / 32 * tiles + t) * 512, 512, tiles * 512, width / 32, c, k0 > 0);
                }
            }
            float* c = sums;
            for (i64 j = 0; j < J; j++)
                for (i64 t = 0; t < rows[j].rank; t += 32, c += 1024)
                    for (i64 m = 0; m < height; m++)
                        store_row(c + 32 * m, s + (m0 + m) * lds + rows[j].c0 + t, least(32, rows[j].rank - t), scales[j]);
        }
    }
}

// y[:, n0:n1] += S_j b_jᵀ for every projection.
extern "C" void lora_expand_bf16(const Row* rows, i64 J, const u16* s, i64 lds, u16* y, i64 ldy, i64 M) {
    i64 at[65] = {0}, most = 0;
    for (i64 j = 0; j < J; j++) {
        at[j + 1] = at[j] + up(rows[j].rank, 32) * up(rows[j].n1 - rows[j].n0, 16);
        most = up(rows[j].rank, 32) > most ? up(rows[j].rank, 32) : most;
    }
    u16* packed = (u16*)scratch<0>(at[J] * 2);
#pragma omp parallel
    {
        for (i64 j = 0; j < J; j++) {
            i64 steps = up(rows[j].rank, 32) / 32, tiles = up(rows[j].n1 - rows[j].n0, 16) / 16;
#pragma omp for schedule(static)
            for (i64 t = 0; t < tiles; t++)
                for (i64 i = 0; i < steps; i++)
                    pack_columns(rows[j].b + 16 * t * rows[j].rank, rows[j].rank, rows[j].rank, rows[j].n1 - rows[j].n0 - 16 * t, i, 1,
                                 packed + at[j] + (t * steps + i) * 512);
        }
        Tiles tiles_on;
        alignas(64) float c[1024];
        u16* left = (u16*)scratch<1>(32 * most * 2);
#pragma omp for schedule(static)
        for (i64 m0 = 0; m0 < M; m0 += 32) {
            i64 height = least(32, M - m0);
            for (i64 j = 0; j < J; j++) {
                i64 steps = up(rows[j].rank, 32) / 32, N = rows[j].n1 - rows[j].n0;
                for (i64 m = 0; m < 32; m++)
                    for (i64 k = 0; k < steps * 32; k += 32)
                        _mm512_store_si512(left + m * steps * 32 + k,
                                           _mm512_maskz_loadu_epi16(m < height ? first32(rows[j].rank - k) : 0, s + (m0 + m) * lds + rows[j].c0 + k));
                for (i64 n = 0; n < N; n += 32) {
                    block(height > 16, n + 16 < N, left, steps * 32, 32, packed + at[j] + n / 16 * steps * 512, steps * 512, 512, steps, c);
                    for (i64 m = 0; m < height; m++)
                        for (i64 half = 0; half < 32 && n + half < N; half += 16) {
                            __mmask16 inside = first16(N - n - half);
                            u16* out = y + (m0 + m) * ldy + rows[j].n0 + n + half;
                            __m512 old = floats(_mm256_maskz_loadu_epi16(inside, out));
                            _mm256_mask_storeu_epi16(out, inside, halves(_mm512_add_ps(old, _mm512_load_ps(c + 32 * m + half))));
                        }
                }
            }
        }
    }
}

// A gradient from the partial sums of all threads, added in their order. partial [threads, rank, n]; `out` is
// [rank, n], or its transpose with `turned`.
static void reduce(const float* partial, i64 threads, i64 stride, i64 rank, i64 n, float scale, bool turned, bool fp32, void* out, i64 from, i64 to) {
    for (i64 r = 0; r < rank; r++)
        for (i64 k = from; k < to; k++) {
            float sum = 0.f;
            for (i64 t = 0; t < threads; t++) sum += partial[t * stride + r * n + k];
            i64 index = turned ? k * rank + r : r * n + k;
            if (fp32) ((float*)out)[index] = sum * scale;
            else ((bf16*)out)[index] = from_float<bf16>(sum * scale);
        }
}

static const i64 CHUNK = 128;  // rows whose part of dy or x stays in the second-level cache between two uses

static void accumulate(const float* c, i64 height, i64 width, float* sum, i64 ld, bool is_first) {
    for (i64 r = 0; r < height; r++)
        for (i64 i = 0; i < width; i += 16) {
            __mmask16 inside = first16(width - i);
            __m512 v = _mm512_load_ps(c + 32 * r + i);
            float* to = sum + r * ld + i;
            if (!is_first) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(inside, to));
            _mm512_mask_storeu_ps(to, inside, v);
        }
}

// dS [M, .] = scale_j * dy_j b_j, and db_j [n, rank] = dy_jᵀ S_j where wanted. ds may be null.
extern "C" void lora_ds_db_bf16(const Row* rows, const float* scales, i64 J, const u16* dy, i64 ldy, const u16* s, i64 lds, u16* ds,
                                i64 ldds, i64 M) {
    i64 at[65] = {0}, sum_at[65] = {0}, most_n = 0, most_r = 0;
    for (i64 j = 0; j < J; j++) {
        i64 N = rows[j].n1 - rows[j].n0;
        at[j + 1] = at[j] + up(N, 32) * up(rows[j].rank, 16);
        sum_at[j + 1] = sum_at[j] + rows[j].rank * N;
        most_n = N > most_n ? N : most_n, most_r = rows[j].rank > most_r ? rows[j].rank : most_r;
    }
    i64 chunks = M > CHUNK ? up(M, CHUNK) / CHUNK : 1, most_threads = omp_get_max_threads(), used = 1;
    u16* packed = (u16*)scratch<0>(at[J] * 2);
    float* partial = (float*)scratch<2>(most_threads * sum_at[J] * 4);
#pragma omp parallel
    {
        for (i64 j = 0; ds && j < J; j++) {
            i64 N = rows[j].n1 - rows[j].n0, tiles = up(rows[j].rank, 16) / 16;
#pragma omp for schedule(static)
            for (i64 i = 0; i < up(N, 32) / 32; i++)
                pack_rows(rows[j].b, rows[j].rank, N, rows[j].rank, i, tiles, packed + at[j] + i * tiles * 512);
        }
        Tiles tiles_on;
        alignas(64) float c[1024];
        i64 threads = least(omp_get_num_threads(), chunks), me = omp_get_thread_num();
#pragma omp single
        used = threads;
        u16* left = (u16*)scratch<1>((up(most_r, 32) * CHUNK + CHUNK * 32 + 32 * up(most_n, 32)) * 2);
        u16 *pairs = left + up(most_r, 32) * CHUNK, *edge = pairs + CHUNK * 32;
        float* sums = partial + me * sum_at[J];
        i64 first = me * chunks / threads, last = me < threads ? (me + 1) * chunks / threads : first;
        for (i64 chunk = first; me < threads && chunk < last; chunk++)
            for (i64 j = 0; j < J; j++) {
                i64 N = rows[j].n1 - rows[j].n0, rank = rows[j].rank, tiles = up(rank, 16) / 16, m0 = chunk * CHUNK;
                i64 height = least(CHUNK, M - m0), steps = up(N, 32) / 32, deep = up(height, 32);
                const u16* from = dy + m0 * ldy + rows[j].n0;
                for (i64 m = 0; ds && m < height; m += 32) {
                    const u16* a = from + m * ldy;
                    i64 lda = ldy;
                    if (N % 32 || height - m < 32) {
                        for (i64 i = 0; i < 32; i++)
                            for (i64 k = 0; k < steps * 32; k += 32)
                                _mm512_store_si512(edge + i * steps * 32 + k, _mm512_maskz_loadu_epi16(m + i < height ? first32(N - k) : 0, a + i * ldy + k));
                        a = edge, lda = steps * 32;
                    }
                    for (i64 t = 0; t < tiles; t += 2) {
                        block(true, t + 1 < tiles, a, lda, 32, packed + at[j] + t * 512, 512, tiles * 512, steps, c);
                        for (i64 i = 0; i < 32 && m + i < height; i++)
                            store_row(c + 32 * i, ds + (m0 + m + i) * ldds + rows[j].c0 + 16 * t, least(32, rank - 16 * t), scales[j]);
                    }
                }
                if (!rows[j].db) continue;
                for (i64 m = 0; m < deep; m += 32)
                    transpose32(s + (m0 + m) * lds + rows[j].c0, lds, height - m, rank, left + m, CHUNK);
                for (i64 n = 0; n < N; n += 32) {
                    for (i64 m = 0; m < deep; m += 32) pack_rows(from + n, ldy, height, N - n, m / 32, 2, pairs + m / 32 * 1024);
                    for (i64 t = 0; t < tiles; t += 2) {
                        block(t + 1 < tiles, n + 16 < N, left + 16 * t * CHUNK, CHUNK, 32, pairs, 512, 1024, deep / 32, c);
                        accumulate(c, least(32, rank - 16 * t), least(32, N - n), sums + sum_at[j] + 16 * t * N + n, N, chunk == first);
                    }
                }
            }
#pragma omp barrier
        for (i64 j = 0; j < J; j++) {
            i64 N = rows[j].n1 - rows[j].n0;
            if (!rows[j].db) continue;
#pragma omp for schedule(static) nowait
            for (i64 n = 0; n < N; n += 64)
                reduce(partial + sum_at[j], used, sum_at[J], rows[j].rank, N, 1.f, true, rows[j].fp32, rows[j].db, n, least(N, n + 64));
        }
    }
}

// dx [M, K] += keep_scale * sum_j mask_j * (dS_j a_j), and da_j [rank, K] = keep_scale * dS_jᵀ mask_j(x) where wanted.
// dx may be null, then x alone is read; x may be null where no da is wanted.
extern "C" void lora_dx_da_bf16(const Row* rows, i64 J, const u16* ds, i64 ldds, const u16* x, i64 ldx, u16* dx, i64 lddx, i64 M, i64 K,
                                i64 seed, i64 dropped, float keep_scale) {
    i64 at[4] = {0}, sum_at[4] = {0}, left_at[4] = {0}, turn_at[4] = {0}, steps = up(K, 32) / 32;
    bool any = false;
    for (i64 j = 0; j < J; j++) {
        at[j + 1] = at[j] + up(rows[j].rank, 32) * steps * 32;
        sum_at[j + 1] = sum_at[j] + rows[j].rank * K;
        left_at[j + 1] = left_at[j] + CHUNK * up(rows[j].rank, 32);
        turn_at[j + 1] = turn_at[j] + CHUNK * up(rows[j].rank, 16);
        any = any || rows[j].da;
    }
    i64 chunks = M > CHUNK ? up(M, CHUNK) / CHUNK : 1, most_threads = omp_get_max_threads(), used = 1;
    u16* packed = (u16*)scratch<0>(at[J] * 2);
    float* partial = (float*)scratch<2>(most_threads * sum_at[J] * 4);
#pragma omp parallel
    {
        for (i64 j = 0; dx && j < J; j++) {
            i64 depth = up(rows[j].rank, 32) / 32;
#pragma omp for schedule(static)
            for (i64 i = 0; i < steps; i++)
                for (i64 d = 0; d < depth; d++)
                    pack_rows(rows[j].a + 32 * i, K, rows[j].rank, K - 32 * i, d, 2, packed + at[j] + (i * depth + d) * 1024);
        }
        Tiles tiles_on;
        alignas(64) float c[3][1024], g[1024];
        alignas(64) u32 kept[3][32];
        if (!dropped) std::memset(kept, 0xff, sizeof kept);
        i64 threads = least(omp_get_num_threads(), chunks), me = omp_get_thread_num();
#pragma omp single
        used = threads;
        u16* left = (u16*)scratch<1>((left_at[J] + turn_at[J] + J * CHUNK * 32) * 2);
        u16 *turned = left + left_at[J], *pairs = turned + turn_at[J];
        float* sums = partial + me * sum_at[J];
        i64 first = me * chunks / threads, last = me < threads ? (me + 1) * chunks / threads : first, lanes = dropped ? J : 1;
        for (i64 chunk = first; me < threads && chunk < last; chunk++) {
            i64 m0 = chunk * CHUNK, height = least(CHUNK, M - m0), deep = up(height, 32);
            for (i64 j = 0; j < J; j++) {
                i64 depth = up(rows[j].rank, 32);
                const u16* from = ds + m0 * ldds + rows[j].c0;
                for (i64 m = 0; m < deep; m++)
                    for (i64 k = 0; k < depth; k += 32)
                        _mm512_store_si512(left + left_at[j] + m * depth + k, _mm512_maskz_loadu_epi16(m < height ? first32(rows[j].rank - k) : 0, from + m * ldds + k));
                for (i64 m = 0; any && m < deep; m += 32) transpose32(from + m * ldds, ldds, height - m, rows[j].rank, turned + turn_at[j] + m, CHUNK);
            }
            for (i64 k = 0; k < K; k += 32) {
                __mmask32 inside = first32(K - k);
                for (i64 m = 0; m < deep; m += 32) {
                    i64 tall = least(32, height - m);
                    for (i64 i = 0; dropped && i < tall; i++) {
                        Mask mask(m0 + m + i, k, seed);
                        for (i64 j = 0; j < lanes; j++) kept[j][i] = mask.kept(j, dropped);
                    }
                    for (i64 pair = 0; any && pair < 16; pair++) {
                        const u16* in = x + (m0 + m + 2 * pair) * ldx + k;
                        for (i64 half = 0; half < 2; half++) {
                            __m512i low = _mm512_setzero_si512(), high = low;
                            if (2 * pair < tall) low = widen(_mm256_maskz_loadu_epi16(inside >> 16 * half, in + 16 * half));
                            if (2 * pair + 1 < tall) high = widen(_mm256_maskz_loadu_epi16(inside >> 16 * half, in + ldx + 16 * half));
                            __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                            for (i64 j = 0; j < lanes; j++) {
                                u32 even = kept[j][2 * pair] >> 16 * half, odd = kept[j][2 * pair + 1] >> 16 * half;
                                __mmask32 bits = _pdep_u32(even, 0x55555555u) | _pdep_u32(odd, 0xaaaaaaaau);
                                _mm512_store_si512(pairs + j * CHUNK * 32 + m * 32 + half * 512 + pair * 32, _mm512_maskz_mov_epi16(bits, both));
                            }
                        }
                    }
                    if (!dx) continue;
                    for (i64 j = 0; j < J; j++) {
                        i64 depth = up(rows[j].rank, 32);
                        block(tall > 16, k + 16 < K, left + left_at[j] + m * depth, depth, 32, packed + at[j] + k * depth, 512, 1024, depth / 32, c[j]);
                    }
                    for (i64 i = 0; i < tall; i++)
                        for (i64 half = 0; half < 2; half++) {
                            u16* out = dx + (m0 + m + i) * lddx + k + 16 * half;
                            __mmask16 here = inside >> 16 * half;
                            __m512 sum = _mm512_setzero_ps();
                            for (i64 j = 0; j < J; j++)
                                sum = _mm512_mask_add_ps(sum, (__mmask16)(kept[dropped ? j : 0][i] >> 16 * half), sum, _mm512_load_ps(&c[j][32 * i + 16 * half]));
                            __m512 old = floats(_mm256_maskz_loadu_epi16(here, out));
                            _mm256_mask_storeu_epi16(out, here, halves(_mm512_fmadd_ps(sum, _mm512_set1_ps(keep_scale), old)));
                        }
                }
                for (i64 j = 0; j < J; j++) {
                    if (!rows[j].da) continue;
                    i64 rank = rows[j].rank, tiles = up(rank, 16) / 16;
                    for (i64 t = 0; t < tiles; t += 2) {
                        block(t + 1 < tiles, k + 16 < K, turned + turn_at[j] + 16 * t * CHUNK, CHUNK, 32, pairs + (dropped ? j : 0) * CHUNK * 32, 512, 1024, deep / 32, g);
                        accumulate(g, least(32, rank - 16 * t), least(32, K - k), sums + sum_at[j] + 16 * t * K + k, K, chunk == first);
                    }
                }
            }
        }
#pragma omp barrier
        for (i64 j = 0; j < J; j++) {
            if (!rows[j].da) continue;
#pragma omp for schedule(static) nowait
            for (i64 k = 0; k < K; k += 64)
                reduce(partial + sum_at[j], used, sum_at[J], rows[j].rank, K, keep_scale, false, rows[j].fp32, rows[j].da, k, least(K, k + 64));
        }
    }
}
#else
extern "C" void lora_tiles_bf16(i64* ready) { *ready = 0; }
#endif
