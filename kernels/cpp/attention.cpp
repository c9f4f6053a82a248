// kernels/attention.py: exact softmax attention where query row t sees the keys lo <= s < hi, forward and backward.
//
// All work is on blocks of query rows of one key head. Scores are held transposed, [keys][rows]: what belongs to a row
// (bounds, maximum, log-sum) is then a vector along the lanes, masks are compares, and rows of k and v are operands as
// they lie in memory. Every extent is padded with zeros to SUB. Matrix products run on AMX tiles, AVX512-BF16 or plain
// vectors; a right operand is stored as words [k / PACK][n], a word holding PACK neighbours along k.
#include "common.h"
#include <algorithm>
#include <cstdlib>
#include <omp.h>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define WITH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, COLUMNS = 4;  // of a vector; vectors side by side in the registers of a product
#elif defined(__AVX__)
constexpr int LANES = 8, COLUMNS = 2;
#else
constexpr int LANES = 4, COLUMNS = 4;
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

constexpr i64 SUB = 32;
constexpr i64 KEYS = 128;         // keys of a block; in the forward between two rescalings
constexpr i64 MAX_ROWS = 128;     // query rows of a block, backward
constexpr i64 FORWARD_ROWS = 64;  // query rows of a block, forward
constexpr i64 CHAIN = 64;         // floats added in a row: shorter chains round less
constexpr float LOG2E = 1.44269504f;
constexpr float LOWEST = -1e30f;  // below every score, and finite: differences of it are no NaN

i64 padded(i64 n) { return (n + SUB - 1) / SUB * SUB; }

template <class V, class P>
inline V load(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class P>
inline void store(P* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// 2^x with 2 ulp for x <= 127, 2^-126 below that; NaN gives NaN.
inline vec exp2_fast(vec x) {
    vec least = vec{} - 126.f;
    x = least > x ? least : x;
    vec shifted = x + 12582912.f;  // 1.5 * 2^23: the integer part lands in the low bits
    vec f = x - (shifted - 12582912.f);
    vec p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.f;
    ivec power = (load<ivec>(&shifted) << 23) + (127 << 23);
    return p * load<vec>(&power);
}

// tanh through e^2x - 1, without cancellation for small x.
inline vec tanh_fast(vec x) {
    vec y = x < 0.f ? -x : x;
    y = y > 12.f ? vec{} + 12.f : y;
    y = y * (2 * LOG2E);
    vec shifted = y + 12582912.f;
    vec f = y - (shifted - 12582912.f);
    vec p = f * 1.5252734e-5f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = (p * f + 6.9314718e-1f) * f;
    ivec power = (load<ivec>(&shifted) << 23) + (127 << 23);
    vec two = load<vec>(&power);
    vec e = p * two + (two - 1.f);
    vec t = e / (e + 2.f);
    return x < 0.f ? -t : t;
}

// Matrix products: C [M][N] (+)= A [M][K] B, with M, N, K multiples of the engine's PAD.

template <int MR, int NR>
inline void float_tile(const float* A, i64 lda, const float* B, i64 ldb, float* C, i64 ldc, i64 K, bool add) {
    vec c[MR][NR];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) c[i][j] = vec{};
    for (i64 k = 0; k < K; k++) {
        vec b[NR];
        for (int j = 0; j < NR; j++) b[j] = load<vec>(B + k * ldb + j * LANES);
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NR; j++) c[i][j] += A[i * lda + k] * b[j];
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) {
            float* to = C + i * ldc + j * LANES;
            store(to, add ? load<vec>(to) + c[i][j] : c[i][j]);
        }
}

void product(const float* A, i64 lda, const float* B, i64 ldb, float* C, i64 ldc, i64 M, i64 N, i64 K, bool add) {
    constexpr i64 WIDE = COLUMNS * LANES;
    for (i64 k = 0; k < K; k += CHAIN, A += CHAIN, B += CHAIN * ldb, add = true) {
        i64 n = 0, some = std::min(CHAIN, K - k);
        for (; n + WIDE <= N; n += WIDE)
            for (i64 m = 0; m < M; m += 4)
                float_tile<4, COLUMNS>(A + m * lda, lda, B + n, ldb, C + m * ldc + n, ldc, some, add);
        for (; n < N; n += LANES)
            for (i64 m = 0; m < M; m += 8)
                float_tile<8, 1>(A + m * lda, lda, B + n, ldb, C + m * ldc + n, ldc, some, add);
    }
}

#ifdef __AVX512BF16__
template <int MR, int NR>
inline void bf16_tile(const bf16* A, i64 lda, const u32* B, i64 ldb, float* C, i64 ldc, i64 K, bool add) {
    __m512 c[MR][NR];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) c[i][j] = add ? _mm512_loadu_ps(C + i * ldc + 16 * j) : _mm512_setzero_ps();
    for (i64 k = 0; k < K; k += 2) {
        __m512i b[NR];
        for (int j = 0; j < NR; j++) b[j] = _mm512_loadu_si512(B + k / 2 * ldb + 16 * j);
        for (int i = 0; i < MR; i++) {
            __m512bh a = (__m512bh)_mm512_set1_epi32(load<int>(A + i * lda + k));
            for (int j = 0; j < NR; j++) c[i][j] = _mm512_dpbf16_ps(c[i][j], a, (__m512bh)b[j]);
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) _mm512_storeu_ps(C + i * ldc + 16 * j, c[i][j]);
}

#ifdef WITH_AMX
// Linux gives a process the tile registers on request (ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA).
const bool HAS_TILES = syscall(SYS_arch_prctl, 0x1023, 18) == 0;

// Tiles of 16 rows of 64 bytes: 0-3 hold C, 4 and 5 A, 6 and 7 B. The empty asm orders them with ordinary stores.
void tile_product(const bf16* A, i64 lda, const u32* B, i64 ldb, float* C, i64 ldc, i64 M, i64 N, i64 K, bool add) {
    asm volatile("" ::: "memory");
    for (i64 n = 0; n < N; n += 32)
        for (i64 m = 0; m < M; m += 32) {
            float *c = C + m * ldc + n, *low = c + 16 * ldc;
            if (add) {
                _tile_loadd(0, c, ldc * 4);
                _tile_loadd(1, c + 16, ldc * 4);
                _tile_loadd(2, low, ldc * 4);
                _tile_loadd(3, low + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (i64 k = 0; k < K; k += 32) {
                const bf16* a = A + m * lda + k;
                const u32* b = B + k / 2 * ldb + n;
                _tile_loadd(4, a, lda * 2);
                _tile_loadd(6, b, ldb * 4);
                _tile_loadd(7, b + 16, ldb * 4);
                _tile_loadd(5, a + 16 * lda, lda * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, c, ldc * 4);
            _tile_stored(1, c + 16, ldc * 4);
            _tile_stored(2, low, ldc * 4);
            _tile_stored(3, low + 16, ldc * 4);
        }
    asm volatile("" ::: "memory");
}
#endif

void product(const bf16* A, i64 lda, const u32* B, i64 ldb, float* C, i64 ldc, i64 M, i64 N, i64 K, bool add) {
#ifdef WITH_AMX
    if (HAS_TILES) return tile_product(A, lda, B, ldb, C, ldc, M, N, K, add);
#endif
    i64 n = 0;
    for (; n + 64 <= N; n += 64)
        for (i64 m = 0; m < M; m += 4) bf16_tile<4, 4>(A + m * lda, lda, B + n, ldb, C + m * ldc + n, ldc, K, add);
    for (; n < N; n += 32)
        for (i64 m = 0; m < M; m += 8) bf16_tile<8, 2>(A + m * lda, lda, B + n, ldb, C + m * ldc + n, ldc, K, add);
}
#endif

// A thread that multiplies tiles sets them up before and gives them back after.
struct Tiles {
    Tiles() {
#ifdef WITH_AMX
        if (!HAS_TILES) return;
        alignas(64) unsigned char config[64] = {1};
        for (int tile = 0; tile < 8; tile++) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
        _tile_loadconfig(config);
#endif
    }
    ~Tiles() {
#ifdef WITH_AMX
        if (HAS_TILES) _tile_release();
#endif
    }
};

// out [columns][rows] = in [rows][columns] of 32-bit words, both multiples of 16.
template <class W>
void transpose(const W* in, i64 ldi, W* out, i64 ldo, i64 rows, i64 columns) {
    for (i64 r = 0; r < rows; r += 16)
        for (i64 c = 0; c < columns; c += 16) {
            const W* from = in + r * ldi + c;
            W* to = out + c * ldo + r;
#ifdef __AVX512F__
            __m512i a[16], b[16];
            for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * ldi);
            for (int i = 0; i < 16; i += 2) {
                b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            }
            for (int i = 0; i < 16; i += 4)
                for (int j = 0; j < 2; j++) {
                    a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                    a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
                }
            for (int i = 0; i < 4; i++) {  // a[4n + i]: column i of each quarter, of rows 4n to 4n + 3
                __m512i even = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88),
                        odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
                __m512i even2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
                __m512i odd2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
                _mm512_storeu_si512(to + i * ldo, _mm512_shuffle_i32x4(even, even2, 0x88));
                _mm512_storeu_si512(to + (4 + i) * ldo, _mm512_shuffle_i32x4(odd, odd2, 0x88));
                _mm512_storeu_si512(to + (8 + i) * ldo, _mm512_shuffle_i32x4(even, even2, 0xdd));
                _mm512_storeu_si512(to + (12 + i) * ldo, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
            }
#else
            for (int i = 0; i < 16; i++)
                for (int j = 0; j < 16; j++) to[j * ldo + i] = from[i * ldi + j];
#endif
        }
}

// Engines: what operands are made of. `Element` lies in rows, `Word` is PACK elements along k, PAD pads head dims.

template <class W>
struct Operand {
    const W* data;
    i64 ld;
};

struct FloatEngine {
    using Element = float;
    using Word = float;
    static constexpr i64 PACK = 1, PAD = 16;

    // Rows as a right operand with k along the rows: as they lie.
    static Operand<Word> words_along_rows(const Element* in, i64 ld, i64, i64, Word*) { return {in, ld}; }

    // Two neighbouring rows of a left operand, and of a right one with k along the rows.
    static void keep_words(Word* to, i64 ld, vec first, vec second) { store(to, first), store(to + ld, second); }
    static void keep_rows(Element* to, i64 ld, vec first, vec second) { store(to, first), store(to + ld, second); }
    static void keep_both(Element* rows, i64 ld, Word* words, vec first, vec second) {
        keep_rows(rows, ld, first, second);
        keep_words(words, ld, first, second);
    }
};

#ifdef __AVX512BF16__
struct Bf16Engine {
    using Element = bf16;
    using Word = u32;
    static constexpr i64 PACK = 2, PAD = SUB;

    static Operand<Word> words_along_rows(const Element* in, i64 ld, i64 rows, i64 width, Word* out) {
        for (i64 r = 0; r < rows; r += 2) {
            const bf16 *a = in + r * ld, *b = a + ld;
            u32* to = out + r / 2 * width;
#pragma omp simd
            for (i64 d = 0; d < width; d++) to[d] = (u32)a[d].bits | (u32)b[d].bits << 16;
        }
        return {out, width};
    }

    static __m512i both(vec first, vec second) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
    static __m512i interleaved(__m512i rows) {
        u16 order[32];
        for (int i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
        return _mm512_permutexvar_epi16(load<__m512i>(order), rows);
    }
    static void store_rows(Element* to, i64 ld, __m512i rows) {
        store(to, _mm512_castsi512_si256(rows));
        store(to + ld, _mm512_extracti64x4_epi64(rows, 1));
    }
    static void keep_words(Word* to, i64, vec first, vec second) { store(to, interleaved(both(first, second))); }
    static void keep_rows(Element* to, i64 ld, vec first, vec second) { store_rows(to, ld, both(first, second)); }
    static void keep_both(Element* rows, i64 ld, Word* words, vec first, vec second) {
        __m512i two = both(first, second);
        store_rows(rows, ld, two);
        store(words, interleaved(two));
    }
};
#endif

template <class T>
struct EngineOf {
    using type = FloatEngine;
};
#ifdef __AVX512BF16__
template <>
struct EngineOf<bf16> {
    using type = Bf16Engine;
};
#endif

// The problem: what is where.

template <class T>
struct Tensor4 {  // [batch][position][head][D], last stride 1
    T* data;
    i64 batch, position, head;
    T* row(i64 b, i64 t, i64 h) const { return data + b * batch + t * position + h * head; }
};

struct Problem {
    i64 B, T, S, H, Hk, D;
    const int32_t* ranges;
    float scale, softcap;

    Problem(const i64* sizes, const int32_t* ranges, float scale, float softcap)
        : B(sizes[0]),
          T(sizes[1]),
          S(sizes[2]),
          H(sizes[3]),
          Hk(sizes[4]),
          D(sizes[5]),
          ranges(ranges),
          scale(scale),
          softcap(softcap) {}
    i64 group() const { return H / Hk; }
    float factor() const { return softcap > 0 ? LOG2E : scale * LOG2E; }  // of a score, in the exponent of 2
};

template <class T>
Tensor4<T> tensor(T* data, const i64* strides) {
    return {data, strides[0], strides[1], strides[2]};
}

// Query rows [begin, end) of all heads that share key head `kh`; they see only keys in [base, base + keys).
struct Unit {
    i64 b, kh, begin, end, base, keys, offset;
};

// One unit for each batch row and key head; more, of fewer query rows, where that would leave threads idle.
std::vector<Unit> units_of(const Problem& p, i64 block) {
    i64 wanted = 4 * omp_get_max_threads(), pairs = p.B * p.Hk;
    i64 chunks = pairs % omp_get_max_threads() == 0 || pairs >= wanted ? 1 : (wanted + pairs - 1) / pairs;
    i64 step = std::max((p.T + chunks - 1) / chunks, std::min(p.T, 2 * block));
    step = (step + block - 1) / block * block;
    std::vector<Unit> units;
    i64 offset = 0;
    for (i64 b = 0; b < p.B; b++)
        for (i64 begin = 0; begin < p.T; begin += step) {
            i64 end = std::min(begin + step, p.T), first = p.S, last = 0;
            for (i64 t = begin; t < end; t++) {
                const int32_t* range = p.ranges + (b * p.T + t) * 2;
                if (range[0] >= range[1]) continue;
                first = std::min(first, std::max<i64>(range[0], 0));
                last = std::max(last, std::min<i64>(range[1], p.S));
            }
            first = first / SUB * SUB;
            i64 keys = padded(std::max<i64>(last - first, 0));
            for (i64 kh = 0; kh < p.Hk; kh++, offset += keys) units.push_back({b, kh, begin, end, first, keys, offset});
        }
    return units;
}

i64 most_keys(const std::vector<Unit>& units) {
    i64 most = SUB;
    for (const Unit& u : units) most = std::max(most, u.keys);
    return most;
}

// A block of query rows: which, and what each of them sees, relative to the unit's first key.
struct Rows {
    i64 count, size;  // size: padded
    i64 head[MAX_ROWS], position[MAX_ROWS];
    alignas(64) int32_t low[MAX_ROWS], high[MAX_ROWS];
    int32_t min_low[MAX_ROWS / LANES], max_low[MAX_ROWS / LANES], min_high[MAX_ROWS / LANES],
        max_high[MAX_ROWS / LANES];
    i64 first, last;  // keys that any row sees, in multiples of SUB

    bool is_one_head;

    Rows(const Problem& p, const Unit& u, i64 start, i64 count) : count(count), size(padded(count)) {
        i64 length = u.end - u.begin, h = u.kh * p.group() + start / length, t = u.begin + start % length;
        is_one_head = t + count <= u.end;
        for (i64 i = 0; i < size; i++) low[i] = INT32_MAX, high[i] = INT32_MIN;
        for (i64 i = 0; i < count; i++) {
            head[i] = h, position[i] = t;
            const int32_t* range = p.ranges + (u.b * p.T + t) * 2;
            if (++t == u.end) t = u.begin, h++;
            if (range[0] >= range[1] || range[1] <= 0 || range[0] >= p.S) continue;
            low[i] = std::max<int32_t>(range[0], 0) - u.base;
            high[i] = std::min<int32_t>(range[1], p.S) - u.base;
        }
        int32_t least = INT32_MAX, most = INT32_MIN;
        for (i64 g = 0; g < size / LANES; g++) {
            int32_t a = INT32_MAX, b = INT32_MIN, c = INT32_MAX, d = INT32_MIN;
#pragma omp simd reduction(min : a, c) reduction(max : b, d)
            for (i64 i = g * LANES; i < (g + 1) * LANES; i++) {
                a = low[i] < a ? low[i] : a, b = low[i] > b ? low[i] : b;
                c = high[i] < c ? high[i] : c, d = high[i] > d ? high[i] : d;
            }
            min_low[g] = a, max_low[g] = b, min_high[g] = c, max_high[g] = d;
            least = std::min(least, a), most = std::max(most, d);
        }
        first = least < most ? least / SUB * SUB : 0;
        last = least < most ? padded(most) : 0;
    }
    bool sees_none(i64 g, i64 key, i64 keys) const { return min_low[g] >= key + keys || max_high[g] <= key; }
    bool sees_all(i64 g, i64 key, i64 keys) const { return max_low[g] <= key && min_high[g] >= key + keys; }
    vec seen(i64 g, i64 key, vec value) const {  // value where the row sees the key, else 0
        ivec l = load<ivec>(low + g * LANES), h = load<ivec>(high + g * LANES);
        return (l <= (int32_t)key) & (h > (int32_t)key) ? value : vec{};
    }
    vec seen_or_lowest(i64 g, i64 key, vec value) const {
        ivec l = load<ivec>(low + g * LANES), h = load<ivec>(high + g * LANES);
        return (l <= (int32_t)key) & (h > (int32_t)key) ? value : vec{} + LOWEST;
    }
};

// Calls work(rows) for the blocks of a unit: `block` rows of one head, or of several heads where a head has fewer.
template <class F>
void for_blocks(const Problem& p, const Unit& u, i64 block, F work) {
    i64 length = u.end - u.begin, all = length * p.group();
    if (length < block)
        for (i64 start = 0; start < all; start += block) work(Rows(p, u, start, std::min(block, all - start)));
    else
        for (i64 h = 0; h < p.group(); h++)
            for (i64 t = 0; t < length; t += block) work(Rows(p, u, h * length + t, std::min(block, length - t)));
}

// Memory of one thread, aligned and given out in pieces.
struct Arena {
    char *memory, *next;
    explicit Arena(i64 bytes) : memory((char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64)), next(memory) {}
    ~Arena() { std::free(memory); }
    template <class E>
    E* take(i64 n) {
        E* piece = (E*)next;
        next += (n * (i64)sizeof(E) + 63) / 64 * 64;
        return piece;
    }
};

template <class E>
inline void convert(const E* in, E* out, i64 n) {
    constexpr i64 LINE = 64 / sizeof(E);
    i64 i = 0;
    for (; i + LINE <= n; i += LINE) std::memcpy((void*)(out + i), in + i, 64);
    if (i < n) std::memcpy((void*)(out + i), in + i, (n - i) * sizeof(E));
}
inline void convert(const bf16* in, float* out, i64 n) {
    for (i64 i = 0; i < n; i++) out[i] = to_float(in[i]);
}
inline void convert(const float* in, bf16* out, i64 n) {
    i64 i = 0;
#ifdef __AVX512BF16__
    for (; i + 16 <= n; i += 16) store(out + i, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(in + i)));
#endif
    for (; i < n; i++) out[i] = from_float<bf16>(in[i]);
}

template <class T, class E>
void take_row(const T* in, E* out, i64 D, i64 width) {
    convert(in, out, D);
    if (width > D) std::memset((void*)(out + D), 0, (width - D) * sizeof(E));
}

// The unit's rows of k or v -> [keys][width], zero in the padding.
template <class T, class E>
void take_keys(const Tensor4<T>& x, const Unit& u, i64 S, E* out, i64 D, i64 width) {
    i64 count = std::min(u.keys, S - u.base);
    for (i64 s = 0; s < count; s++) take_row(x.row(u.b, u.base + s, u.kh), out + s * width, D, width);
    std::memset((void*)(out + count * width), 0, (u.keys - count) * width * sizeof(E));
}

// A block's rows of q or of the gradient of o: where they lie if they need no padding, else copied.
template <class T, class E>
Operand<E> rows_of(const Tensor4<const T>& x, const Unit& u, const Rows& r, E* copy, i64 D, i64 width) {
    if constexpr (std::is_same_v<T, E>)
        if (r.is_one_head && r.count == r.size && D == width && x.position % 2 == 0)
            return {x.row(u.b, r.position[0], r.head[0]), x.position};
    for (i64 i = 0; i < r.count; i++) take_row(x.row(u.b, r.position[i], r.head[i]), copy + i * width, D, width);
    std::memset((void*)(copy + r.count * width), 0, (r.size - r.count) * width * sizeof(E));
    return {copy, width};
}

// Rows [size][width] -> right operand with k along the columns.
template <class X>
void words_along_columns(const Operand<typename X::Element>& in, i64 size, i64 width, typename X::Word* out, i64 ld) {
    transpose((const typename X::Word*)in.data, in.ld / X::PACK, out, ld, size, width / X::PACK);
}

// [keys][width] -> [width][keys], `ld` elements apart; spare holds SUB * width words.
template <class X>
void transpose_keys(const typename X::Element* in, typename X::Element* out, i64 ld, i64 keys, i64 width,
                    typename X::Word* spare) {
    for (i64 s = 0; s < keys; s += SUB) {
        auto words = X::words_along_rows(in + s * width, width, SUB, width, spare);
        transpose(words.data, words.ld, (typename X::Word*)out + s / X::PACK, ld / X::PACK, SUB / X::PACK, width);
    }
}

// [width][ld] transposed and stored as the block's rows of `x`.
template <class T>
void store_rows(const Tensor4<T>& x, const Unit& u, const Rows& r, const float* in, i64 ld, float* spare, i64 D,
                i64 width) {
    transpose(in, ld, spare, width, width, r.size);
    for (i64 i = 0; i < r.count; i++) convert(spare + i * width, x.row(u.b, r.position[i], r.head[i]), D);
}

void cap_scores(float* scores, i64 ld, i64 keys, i64 rows, const Problem& p) {
    for (i64 j = 0; j < keys; j++)
        for (i64 i = 0; i < rows; i += LANES) {
            float* s = scores + j * ld + i;
            store(s, tanh_fast(load<vec>(s) * (p.scale / p.softcap)) * p.softcap);
        }
}

// Forward. For the rows of a block: m the largest exponent so far, sum the weights relative to it.

// Scores [keys][rows] of one group of lanes -> words of weights; returns what earlier sums are multiplied by.
template <class X, bool ALL>
inline vec weigh(const float* scores, typename X::Word* weights, i64 ld, const Rows& r, i64 g, i64 key, i64 keys,
                 float factor, vec& m, vec& sum) {
    vec least = vec{} + LOWEST, top[4] = {least, least, least, least};
    i64 from = ALL ? 0 : std::clamp<i64>(r.min_low[g] - key, 0, keys) / 4 * 4;
    i64 to = ALL ? keys : std::max(from, (std::clamp<i64>(r.max_high[g] - key, 0, keys) + 3) / 4 * 4);
    for (i64 j = from; j < to; j += 4)
        for (int n = 0; n < 4; n++) {
            vec s = load<vec>(scores + (j + n) * ld);
            top[n] = larger(top[n], ALL ? s : r.seen_or_lowest(g, key + j + n, s));
        }
    vec highest = larger(m, larger(larger(top[0], top[1]), larger(top[2], top[3])) * factor);
    vec first_sum = {}, second_sum = {};
    for (i64 j = 0; j < from; j += 2) X::keep_words(weights + j / X::PACK * ld, ld, vec{}, vec{});
    for (i64 j = to; j < keys; j += 2) X::keep_words(weights + j / X::PACK * ld, ld, vec{}, vec{});
    for (i64 j = from; j < to; j += 2) {
        vec first = exp2_fast(load<vec>(scores + j * ld) * factor - highest);
        vec second = exp2_fast(load<vec>(scores + (j + 1) * ld) * factor - highest);
        if (!ALL) first = r.seen(g, key + j, first), second = r.seen(g, key + j + 1, second);
        first_sum += first, second_sum += second;
        X::keep_words(weights + j / X::PACK * ld, ld, first, second);
    }
    vec shrink = exp2_fast(m - highest);
    sum = sum * shrink + (first_sum + second_sum);
    m = highest;
    return shrink;
}

template <class X>
struct ForwardMemory {
    using E = typename X::Element;
    using W = typename X::Word;
    E *k, *v, *vt, *q;
    W *qt, *weights, *spare;
    float *scores, *out, *rows;
    i64 ld;  // of vt: not a multiple of a page, whose lines would share cache sets

    static i64 bytes(i64 keys, i64 width) {
        return sizeof(E) * (2 * keys * width + width * (keys + 64) + 3 * FORWARD_ROWS * width) +
               sizeof(W) * SUB * width + (sizeof(float) + sizeof(W)) * KEYS * FORWARD_ROWS + 8 * FORWARD_ROWS * width +
               4096;
    }
    ForwardMemory(Arena& arena, i64 keys, i64 width) : ld(keys + 64) {
        k = arena.take<E>(keys * width), v = arena.take<E>(keys * width), vt = arena.take<E>(width * ld);
        q = arena.take<E>(FORWARD_ROWS * width);
        qt = arena.take<W>(width / X::PACK * FORWARD_ROWS), weights = arena.take<W>(KEYS / X::PACK * FORWARD_ROWS);
        spare = arena.take<W>(SUB * width), scores = arena.take<float>(KEYS * FORWARD_ROWS);
        out = arena.take<float>(width * FORWARD_ROWS), rows = arena.take<float>(FORWARD_ROWS * width);
    }
};

template <class T, class X>
void forward_block(const Problem& p, const Unit& u, const Rows& r, const ForwardMemory<X>& s, const Tensor4<const T>& q,
                   const Tensor4<T>& o, float* lse, i64 width) {
    constexpr i64 LD = FORWARD_ROWS;
    i64 groups = r.size / LANES;
    vec m[LD / LANES], sum[LD / LANES];
    for (i64 g = 0; g < groups; g++) m[g] = vec{} + LOWEST, sum[g] = vec{};
    words_along_columns<X>(rows_of(q, u, r, s.q, p.D, width), r.size, width, s.qt, LD);
    if (r.first == r.last) std::memset(s.out, 0, sizeof(float) * width * LD);
    for (i64 key = r.first; key < r.last; key += KEYS) {
        i64 keys = std::min(KEYS, r.last - key);
        product(s.k + key * width, width, s.qt, LD, s.scores, LD, keys, r.size, width, false);
        if (p.softcap > 0) cap_scores(s.scores, LD, keys, r.size, p);
        for (i64 g = 0; g < groups; g++) {
            const float* scores = s.scores + g * LANES;
            typename X::Word* weights = s.weights + g * LANES;
            vec shrink = r.sees_all(g, key, keys)
                             ? weigh<X, true>(scores, weights, LD, r, g, key, keys, p.factor(), m[g], sum[g])
                             : weigh<X, false>(scores, weights, LD, r, g, key, keys, p.factor(), m[g], sum[g]);
            if (key == r.first) continue;
            for (i64 d = 0; d < width; d++) {
                float* out = s.out + d * LD + g * LANES;
                store(out, load<vec>(out) * shrink);
            }
        }
        product(s.vt + key, s.ld, s.weights, LD, s.out, LD, width, r.size, keys, key > r.first);
    }
    for (i64 g = 0; g < groups; g++) {
        vec inverse = sum[g] > 0.f ? 1.f / sum[g] : sum[g];  // a NaN stays
        for (i64 d = 0; d < width; d++) {
            float* out = s.out + d * LD + g * LANES;
            store(out, load<vec>(out) * inverse);
        }
        for (i64 i = g * LANES; i < std::min(r.count, (g + 1) * LANES); i++) {
            float total = sum[g][i % LANES];
            lse[(u.b * p.H + r.head[i]) * p.T + r.position[i]] =
                total == 0 ? INFINITY : m[g][i % LANES] + std::log2(total);
        }
    }
    store_rows(o, u, r, s.out, LD, s.rows, p.D, width);
}

i64 width_of(const Problem& p, i64 pad) { return (p.D + pad - 1) / pad * pad; }

// Backward. With P the weights, dP = dO v^T and delta = sum(dO * o): dS = P (dP - delta), dv = P^T dO, dk = dS^T q, dq
// = dS k.

template <class X>
struct BackwardMemory {
    using E = typename X::Element;
    using W = typename X::Word;
    E *k, *v, *kt, *q, *g, *weights, *slopes;
    W *qt, *gt, *qr, *gr, *slope_words, *spare;
    float *scores, *dp, *dq, *rows;
    i64 ld;

    static i64 bytes(i64 keys, i64 width) {
        return sizeof(E) * (2 * keys * width + width * (keys + 64) + 6 * MAX_ROWS * width + 2 * SUB * MAX_ROWS) +
               sizeof(W) * (SUB * width + KEYS * MAX_ROWS) +
               sizeof(float) * (2 * SUB * MAX_ROWS + 2 * MAX_ROWS * width) + 4096;
    }
    BackwardMemory(Arena& arena, i64 keys, i64 width) : ld(keys + 64) {
        k = arena.take<E>(keys * width), v = arena.take<E>(keys * width), kt = arena.take<E>(width * ld);
        q = arena.take<E>(MAX_ROWS * width), g = arena.take<E>(MAX_ROWS * width);
        weights = arena.take<E>(SUB * MAX_ROWS), slopes = arena.take<E>(SUB * MAX_ROWS);
        qt = arena.take<W>(width / X::PACK * MAX_ROWS), gt = arena.take<W>(width / X::PACK * MAX_ROWS);
        qr = arena.take<W>(MAX_ROWS / X::PACK * width), gr = arena.take<W>(MAX_ROWS / X::PACK * width);
        slope_words = arena.take<W>(KEYS / X::PACK * MAX_ROWS), spare = arena.take<W>(SUB * width);
        scores = arena.take<float>(SUB * MAX_ROWS), dp = arena.take<float>(SUB * MAX_ROWS);
        dq = arena.take<float>(width * MAX_ROWS), rows = arena.take<float>(MAX_ROWS * width);
    }
};

// SUB keys x one group of lanes: scores and dp -> weights and slopes (dS * scale).
template <class X, bool ALL>
inline void differentiate(const BackwardMemory<X>& s, const Problem& p, const Rows& r, i64 g, i64 key, i64 at, vec lse,
                          vec delta) {
    constexpr i64 LD = MAX_ROWS;
    float factor = p.factor(), uncap = p.softcap > 0 ? 1 / p.softcap : 0;
    for (i64 j = 0; j < SUB; j += 2) {
        vec weight[2], slope[2];
        for (int n = 0; n < 2; n++) {
            i64 here = (j + n) * LD + g * LANES;
            vec score = load<vec>(s.scores + here);
            weight[n] = exp2_fast(score * factor - lse);
            if (!ALL) weight[n] = r.seen(g, key + j + n, weight[n]);
            slope[n] = weight[n] * (load<vec>(s.dp + here) - delta) * p.scale;
            vec capped = score * uncap;
            slope[n] -= slope[n] * (capped * capped);
        }
        i64 here = j * LD + g * LANES;
        X::keep_rows(s.weights + here, LD, weight[0], weight[1]);
        X::keep_both(s.slopes + here, LD, s.slope_words + (at + j) / X::PACK * LD + g * LANES, slope[0], slope[1]);
    }
}

template <class X>
struct RowValues {  // of the rows of a block
    alignas(64) float lse[MAX_ROWS], delta[MAX_ROWS];
};

// KEYS keys of a block from `key`: adds to dk and dv, writes slope_words for dq.
template <class X>
void backward_keys(const Problem& p, const Rows& r, const BackwardMemory<X>& s, const RowValues<X>& values,
                   const Operand<typename X::Word>& qr, const Operand<typename X::Word>& gr, float* dk, float* dv,
                   i64 key, i64 keys, i64 width) {
    constexpr i64 LD = MAX_ROWS, STEP = SUB / LANES;
    for (i64 at = 0; at < keys; at += SUB) {
        i64 here = key + at, from = r.size / LANES, to = 0;
        for (i64 g = 0; g < r.size / LANES; g++)
            if (!r.sees_none(g, here, SUB)) from = std::min(from, g / STEP * STEP), to = g / STEP * STEP + STEP;
        for (i64 g = 0; g < r.size / LANES; g++)
            if (g < from || g >= to)
                for (i64 j = 0; j < SUB; j += 2)
                    X::keep_words(s.slope_words + (at + j) / X::PACK * LD + g * LANES, LD, vec{}, vec{});
        if (from >= to) continue;
        i64 i = from * LANES, rows = (to - from) * LANES;
        product(s.k + here * width, width, s.qt + i, LD, s.scores + i, LD, SUB, rows, width, false);
        product(s.v + here * width, width, s.gt + i, LD, s.dp + i, LD, SUB, rows, width, false);
        if (p.softcap > 0) cap_scores(s.scores + i, LD, SUB, rows, p);
        for (i64 g = from; g < to; g++) {
            vec lse = load<vec>(values.lse + g * LANES), delta = load<vec>(values.delta + g * LANES);
            if (r.sees_all(g, here, SUB))
                differentiate<X, true>(s, p, r, g, here, at, lse, delta);
            else
                differentiate<X, false>(s, p, r, g, here, at, lse, delta);
        }
        product(s.weights + i, LD, gr.data + i / X::PACK * gr.ld, gr.ld, dv + here * width, width, SUB, width, rows,
                true);
        product(s.slopes + i, LD, qr.data + i / X::PACK * qr.ld, qr.ld, dk + here * width, width, SUB, width, rows,
                true);
    }
}

template <class T>
struct BackwardTensors {
    Tensor4<const T> q, k, v, o, g;
    Tensor4<T> dq, dk, dv;
    const float* lse;
};

template <class T, class X>
void backward_block(const Problem& p, const Unit& u, const Rows& r, const BackwardMemory<X>& s,
                    const BackwardTensors<T>& x, float* dk, float* dv, i64 width) {
    constexpr i64 LD = MAX_ROWS;
    RowValues<X> values;
    for (i64 i = 0; i < r.size; i++) {
        values.lse[i] = INFINITY, values.delta[i] = 0;
        if (i >= r.count) continue;
        const T *g = x.g.row(u.b, r.position[i], r.head[i]), *o = x.o.row(u.b, r.position[i], r.head[i]);
        float delta = 0;
#pragma omp simd reduction(+ : delta)
        for (i64 d = 0; d < p.D; d++) delta += to_float(g[d]) * to_float(o[d]);
        values.delta[i] = delta;
        values.lse[i] = x.lse[(u.b * p.H + r.head[i]) * p.T + r.position[i]];
    }
    auto q = rows_of(x.q, u, r, s.q, p.D, width), g = rows_of(x.g, u, r, s.g, p.D, width);
    words_along_columns<X>(q, r.size, width, s.qt, LD);
    words_along_columns<X>(g, r.size, width, s.gt, LD);
    auto qr = X::words_along_rows(q.data, q.ld, r.size, width, s.qr),
         gr = X::words_along_rows(g.data, g.ld, r.size, width, s.gr);
    if (r.first == r.last) std::memset(s.dq, 0, sizeof(float) * width * LD);
    for (i64 key = r.first; key < r.last; key += KEYS) {
        i64 keys = std::min(KEYS, r.last - key);
        backward_keys(p, r, s, values, qr, gr, dk, dv, key, keys, width);
        product(s.kt + key, s.ld, s.slope_words, LD, s.dq, LD, width, r.size, keys, key > r.first);
    }
    store_rows(x.dq, u, r, s.dq, LD, s.rows, p.D, width);
}

// Sums of a unit that has all queries -> dk or dv; keys outside the unit have none.
template <class T>
void store_keys(const Problem& p, const Tensor4<T>& x, const Unit& u, const float* sums, i64 width) {
    for (i64 s = 0; s < p.S; s++) {
        T* to = x.row(u.b, s, u.kh);
        if (s >= u.base && s < u.base + u.keys)
            convert(sums + (s - u.base) * width, to, p.D);
        else
            std::fill(to, to + p.D, from_float<T>(0.f));
    }
}

// The same where several units hold a part: `parts` of those of one batch row and key head, in the order of the units.
template <class T>
void store_parts(const Problem& p, const Tensor4<T>& x, const std::vector<Unit>& units, const float* parts, i64 b,
                 i64 kh, i64 width) {
    std::vector<Unit> own;
    for (const Unit& u : units)
        if (u.b == b && u.kh == kh) own.push_back(u);
    std::vector<float> row(p.D);
    for (i64 s = 0; s < p.S; s++) {
        std::fill(row.begin(), row.end(), 0.f);
        for (const Unit& u : own) {
            if (s < u.base || s >= u.base + u.keys) continue;
            const float* part = parts + (u.offset + s - u.base) * width;
            for (i64 d = 0; d < p.D; d++) row[d] += part[d];
        }
        convert(row.data(), x.row(b, s, kh), p.D);
    }
}

}  // namespace

// sizes: B T S H Hk D; strides: (batch, position, head) of q, k, v, o, in elements. lse [B, H, T] in powers of 2.
template <class T>
static void attention_forward_impl(const T* q, const T* k, const T* v, const int32_t* ranges, T* o, float* lse,
                                   const i64* sizes, const i64* strides, float scale, float softcap) {
    using X = typename EngineOf<T>::type;
    Problem p(sizes, ranges, scale, softcap);
    i64 width = width_of(p, X::PAD);
    auto tq = tensor(q, strides), tk = tensor(k, strides + 3), tv = tensor(v, strides + 6);
    auto to = tensor(o, strides + 9);
    std::vector<Unit> units = units_of(p, FORWARD_ROWS);
    i64 count = units.size(), keys = most_keys(units);
#pragma omp parallel
    {
        Tiles tiles;
        Arena arena(ForwardMemory<X>::bytes(keys, width));
        ForwardMemory<X> s(arena, keys, width);
#pragma omp for schedule(dynamic, 1)
        for (i64 n = 0; n < count; n++) {
            const Unit& u = units[count - 1 - n];
            take_keys(tv, u, p.S, s.v, p.D, width);
            transpose_keys<X>(s.v, s.vt, s.ld, u.keys, width, s.spare);
            take_keys(tk, u, p.S, s.k, p.D, width);
            for_blocks(p, u, FORWARD_ROWS, [&](const Rows& r) { forward_block<T, X>(p, u, r, s, tq, to, lse, width); });
        }
    }
}
EXPORT(attention_forward,
       (const T* q, const T* k, const T* v, const int32_t* ranges, T* o, float* lse, const i64* sizes,
        const i64* strides, float scale, float softcap),
       (q, k, v, ranges, o, lse, sizes, strides, scale, softcap))

// strides: of q, k, v, o, g (gradient of o), dq, dk, dv.
template <class T>
static void attention_backward_impl(const T* q, const T* k, const T* v, const T* o, const T* g, const int32_t* ranges,
                                    const float* lse, T* dq, T* dk, T* dv, const i64* sizes, const i64* strides,
                                    float scale, float softcap) {
    using X = typename EngineOf<T>::type;
    Problem p(sizes, ranges, scale, softcap);
    i64 width = width_of(p, X::PAD);
    BackwardTensors<T> x{tensor(q, strides),       tensor(k, strides + 3),   tensor(v, strides + 6),
                         tensor(o, strides + 9),   tensor(g, strides + 12),  tensor(dq, strides + 15),
                         tensor(dk, strides + 18), tensor(dv, strides + 21), lse};
    std::vector<Unit> units = units_of(p, MAX_ROWS);
    i64 count = units.size(), keys = most_keys(units), all = units.back().offset + units.back().keys;
    bool is_whole = count == p.B * p.Hk;
    Arena shared(is_whole ? 64 : 2 * all * width * sizeof(float) + 64);
    float* parts = shared.take<float>(0);
#pragma omp parallel
    {
        Tiles tiles;
        Arena arena(BackwardMemory<X>::bytes(keys, width) + (is_whole ? 8 * keys * width + 128 : 0));
        BackwardMemory<X> s(arena, keys, width);
        float *own_k = arena.take<float>(is_whole ? keys * width : 0),
              *own_v = arena.take<float>(is_whole ? keys * width : 0);
#pragma omp for schedule(dynamic, 1)
        for (i64 n = 0; n < count; n++) {
            const Unit& u = units[count - 1 - n];
            float *part_k = is_whole ? own_k : parts + u.offset * width,
                  *part_v = is_whole ? own_v : part_k + all * width;
            std::memset(part_k, 0, u.keys * width * sizeof(float));
            std::memset(part_v, 0, u.keys * width * sizeof(float));
            take_keys(x.k, u, p.S, s.k, p.D, width);
            take_keys(x.v, u, p.S, s.v, p.D, width);
            transpose_keys<X>(s.k, s.kt, s.ld, u.keys, width, s.spare);
            for_blocks(p, u, MAX_ROWS,
                       [&](const Rows& r) { backward_block<T, X>(p, u, r, s, x, part_k, part_v, width); });
            if (!is_whole) continue;
            store_keys(p, x.dk, u, part_k, width);
            store_keys(p, x.dv, u, part_v, width);
        }
#pragma omp for schedule(static)
        for (i64 n = 0; n < (is_whole ? 0 : p.B * p.Hk); n++) {
            store_parts(p, x.dk, units, parts, n / p.Hk, n % p.Hk, width);
            store_parts(p, x.dv, units, parts + all * width, n / p.Hk, n % p.Hk, width);
        }
    }
}
EXPORT(attention_backward,
       (const T* q, const T* k, const T* v, const T* o, const T* g, const int32_t* ranges, const float* lse, T* dq,
        T* dk, T* dv, const i64* sizes, const i64* strides, float scale, float softcap),
       (q, k, v, o, g, ranges, lse, dq, dk, dv, sizes, strides, scale, softcap))
