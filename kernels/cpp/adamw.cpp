// kernels/adapter_adamw.py: gradient norm, clip and AdamW of many tensors in one call; T is the type of the gradients.
#include "common.h"
#include <vector>

namespace {

const i64 CHUNK = 16384, BLOCK = 256;

// One tensor, as the Python side lays it out: addresses, size, then numbers. The maxima of blocks are null for fp32 state.
struct Segment {
    float *param;
    const void* grad;
    void *exp_avg, *exp_avg_sq;
    float *exp_avg_max, *exp_avg_sq_max, *step;
    i64 size;
};
struct Numbers {
    double lr, weight_decay, beta1, beta2, eps;
};
struct Chunk {
    i64 segment, from, to;
};
// What one update needs of a segment, in the precision of the update.
struct Factors {
    float decay, keep1, add1, keep2, add2, step_size, root2, eps, scale;
};

std::vector<Chunk> chunks_of(const Segment* segments, i64 count) {
    std::vector<Chunk> chunks;
    for (i64 s = 0; s < count; s++)
        for (i64 from = 0; from < segments[s].size; from += CHUNK)
            chunks.push_back({s, from, from + CHUNK < segments[s].size ? from + CHUNK : segments[s].size});
    return chunks;
}

Factors factors_of(const Numbers& x, double step, double scale) {
    const double first = 1 - std::pow(x.beta1, step), second = 1 - std::pow(x.beta2, step);
    return {(float)(1 - x.lr * x.weight_decay), (float)x.beta1, (float)(1 - x.beta1), (float)x.beta2, (float)(1 - x.beta2),
            (float)(x.lr / first), (float)std::sqrt(second), (float)x.eps, (float)scale};
}

// One element: the moments in place, and the new parameter.
inline float updated(float param, float grad, float& exp_avg, float& exp_avg_sq, const Factors& f) {
    exp_avg += f.add1 * (grad - exp_avg);
    exp_avg_sq = f.keep2 * exp_avg_sq + f.add2 * grad * grad;
    return param * f.decay - f.step_size * exp_avg / (std::sqrt(exp_avg_sq) / f.root2 + f.eps);
}

template <class T> void update(const Segment& s, const Chunk& c, const Factors& f) {
    float* __restrict param = s.param;
    const T* __restrict grad = (const T*)s.grad;
    float* __restrict exp_avg = (float*)s.exp_avg;
    float* __restrict exp_avg_sq = (float*)s.exp_avg_sq;
#pragma omp simd
    for (i64 i = c.from; i < c.to; i++) {
        float m = exp_avg[i], v = exp_avg_sq[i];
        param[i] = updated(param[i], to_float(grad[i]) * f.scale, m, v, f);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
    }
}

// The number of the code nearest to x; `middles` are the 255 points between neighbouring codes.
inline int nearest(float x, const float* middles) {
    int code = 0;
    for (int bit = 128; bit; bit >>= 1) code += x > middles[code + bit - 1] ? bit : 0;
    return code;
}

// Moments as bytes: code * maximum of the block. `codes` [4, 256]: signed codes, unsigned codes, middles of both.
template <class T> void update_8bit(const Segment& s, const Chunk& c, const Factors& f, const float* codes) {
    uint8_t *first = (uint8_t*)s.exp_avg, *second = (uint8_t*)s.exp_avg_sq;
    const T* grad = (const T*)s.grad;
    for (i64 from = c.from; from < c.to; from += BLOCK) {
        const int count = (int)(c.to - from < BLOCK ? c.to - from : BLOCK);
        float &max1 = s.exp_avg_max[from / BLOCK], &max2 = s.exp_avg_sq_max[from / BLOCK];
        float m[BLOCK], v[BLOCK], high1 = 0, high2 = 0;
#pragma omp simd reduction(max : high1, high2)
        for (int i = 0; i < count; i++) {
            float a = codes[first[from + i]] * max1, b = codes[256 + second[from + i]] * max2;
            s.param[from + i] = updated(s.param[from + i], to_float(grad[from + i]) * f.scale, a, b, f);
            m[i] = a;
            v[i] = b;
            high1 = std::fabs(a) > high1 ? std::fabs(a) : high1;
            high2 = b > high2 ? b : high2;
        }
        max1 = high1;
        max2 = high2;
        const float inverse1 = high1 > 0 ? 1 / high1 : 0, inverse2 = high2 > 0 ? 1 / high2 : 0;
#pragma omp simd
        for (int i = 0; i < count; i++) {
            first[from + i] = (uint8_t)nearest(m[i] * inverse1, codes + 512);
            second[from + i] = (uint8_t)nearest(v[i] * inverse2, codes + 768);
        }
    }
}

template <class T> double sum_of_squares(const T* grad, i64 from, i64 to) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 i = from; i < to; i++) sum += (double)to_float(grad[i]) * to_float(grad[i]);
    return sum;
}

template <class T> double norm_of(const Segment* segments, const std::vector<Chunk>& chunks) {
    std::vector<double> sums(chunks.size());
#pragma omp parallel for schedule(static)
    for (i64 c = 0; c < (i64)chunks.size(); c++)
        sums[c] = sum_of_squares((const T*)segments[chunks[c].segment].grad, chunks[c].from, chunks[c].to);
    double total = 0;
    for (double sum : sums) total += sum;
    return std::sqrt(total);
}

// max_norm 0: no norm is taken. Else it goes to *norm, and gradients that are not finite change nothing at all.
template <class T>
void adamw_impl(const i64* segment_words, const double* number_words, const float* codes, i64 count, float max_norm, double* norm) {
    const Segment* segments = (const Segment*)segment_words;
    const Numbers* numbers = (const Numbers*)number_words;
    const std::vector<Chunk> chunks = chunks_of(segments, count);
    double scale = 1;
    if (max_norm > 0) {
        *norm = norm_of<T>(segments, chunks);
        if (!std::isfinite(*norm)) return;
        scale = max_norm / (*norm + 1e-6);
        scale = scale < 1 ? scale : 1;
    }
    std::vector<Factors> factors(count);
    for (i64 s = 0; s < count; s++) factors[s] = factors_of(numbers[s], *segments[s].step += 1, scale);
#pragma omp parallel for schedule(static)
    for (i64 c = 0; c < (i64)chunks.size(); c++) {
        const Segment& s = segments[chunks[c].segment];
        const Factors& f = factors[chunks[c].segment];
        if (s.exp_avg_max)
            update_8bit<T>(s, chunks[c], f, codes);
        else
            update<T>(s, chunks[c], f);
    }
}

}  // namespace

EXPORT(adamw, (const i64* segments, const double* numbers, const float* codes, i64 count, float max_norm, double* norm),
       (segments, numbers, codes, count, max_norm, norm))
