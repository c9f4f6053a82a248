// kernels/linear_cross_entropy.py: rows of logits [M, V] -> loss and hit of every row, and d loss / d logits in place.
// Wide vectors pay here: nearly all of the time is in exponentials.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif
#include "common.h"
#include <vector>

namespace {

const i64 BLOCK = 4096;

// exp of a number that is not positive; everything below -87 counts as -87.
inline float exp_nonpositive(float x) { return exp_fast(x < -87.f ? -87.f : x); }

// tanh with 2 ulp: a polynomial around 0, where the quotient of exponentials would cancel.
inline float tanh_fast(float x) {
    float size = std::fabs(x), e = exp_nonpositive(-2.f * size), s = x * x;
    float p = -5.71702e-3f * s + 2.065056e-2f;
    p = p * s - 5.374349e-2f;
    p = p * s + 1.3331491e-1f;
    p = p * s - 3.3333284e-1f;
    float near_zero = std::fmaf(p * s, x, x), far = std::copysign((1.f - e) / (1.f + e), x);
    return size < 0.625f ? near_zero : far;
}

struct Options {
    double smoothing;
    float softcap;
    double z_loss;
};

struct Row {
    float top, total_log;
    double total, lse, loss;
    bool is_hit;
};

// `values` [V] receives the capped logits where CAP, else exp(logit - top). Sums of blocks are added in double.
template <class T, bool CAP> Row forward_row(const T* __restrict z, float* __restrict values, i64 V, i64 target, const Options& options) {
    const float raw_target = to_float(z[target]), cap = options.softcap, inverse = CAP ? 1 / cap : 0;
    float highest = -INFINITY;
    double total = 0, plain_sum = 0;
    for (i64 from = 0; from < V; from += BLOCK) {
        const int count = (int)(V - from < BLOCK ? V - from : BLOCK);
        const T* __restrict in = z + from;
        float* __restrict out = values + from;
        float sum = 0;
#pragma omp simd reduction(max : highest) reduction(+ : sum)
        for (int v = 0; v < count; v++) {
            float value = to_float(in[v]);
            highest = value > highest ? value : highest;
            if (CAP) out[v] = value = cap * tanh_fast(value * inverse);
            sum += value;
        }
        plain_sum += sum;
    }
    // The first of several highest logits is the answer, as in torch.argmax.
    bool is_hit = raw_target == highest;
    for (i64 v = 0; is_hit && v < target; v++) is_hit = to_float(z[v]) != highest;
    const float top = CAP ? cap * tanh_fast(highest * inverse) : highest;
    for (i64 from = 0; from < V; from += BLOCK) {
        const int count = (int)(V - from < BLOCK ? V - from : BLOCK);
        const T* __restrict in = z + from;
        float* __restrict out = values + from;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int v = 0; v < count; v++) {
            float e = exp_nonpositive((CAP ? out[v] : to_float(in[v])) - top);
            if (!CAP) out[v] = e;
            sum += e;
        }
        total += sum;
    }
    const double lse = top + std::log(total), logit = CAP ? values[target] : raw_target;
    // Without smoothing a logit of -inf must not turn 0 * -inf into NaN.
    const double shift = options.smoothing > 0 ? options.smoothing * plain_sum / V : 0;
    const double loss = lse - (1 - options.smoothing) * logit - shift + options.z_loss * lse * lse;
    return {top, (float)std::log(total), total, lse, loss, is_hit};
}

template <class T, bool CAP> void backward_row(T* __restrict z, const float* __restrict values, i64 V, i64 target, const Row& row, const Options& options) {
    const double slope = 1 + 2 * options.z_loss * row.lse;
    const float weight = (float)(CAP ? slope : slope / row.total), shift = (float)(options.smoothing / V);
    const float inverse = CAP ? 1 / options.softcap : 0, top = row.top, total_log = row.total_log;
    auto gradient = [=](float value, float missing) {
        if (!CAP) return weight * value - shift - missing;
        float share = value * inverse;
        return (weight * exp_nonpositive(value - top - total_log) - shift - missing) * (1 - share * share);
    };
    const float missing = (float)(1 - options.smoothing);
#pragma omp simd
    for (i64 v = 0; v < V; v++) z[v] = from_float<T>(gradient(values[v], 0.f));
    z[target] = from_float<T>(gradient(values[target], missing));
}

template <class T, bool CAP>
void rows(T* logits, const i64* targets, float* losses, i64* hits, i64 M, i64 V, Options options, bool with_grad) {
#pragma omp parallel
    {
        std::vector<float> values(V);
#pragma omp for schedule(static)
        for (i64 m = 0; m < M; m++) {
            T* z = logits + m * V;
            Row row = forward_row<T, CAP>(z, values.data(), V, targets[m], options);
            losses[m] = (float)row.loss;
            hits[m] = row.is_hit;
            if (with_grad) backward_row<T, CAP>(z, values.data(), V, targets[m], row, options);
        }
    }
}

// softcap 0 is none.
template <class T>
void cross_entropy_impl(T* logits, const i64* targets, float* losses, i64* hits, i64 M, i64 V, float smoothing, float softcap, float z_loss, i64 with_grad) {
    const Options options{smoothing, softcap, z_loss};
    (softcap > 0 ? rows<T, true> : rows<T, false>)(logits, targets, losses, hits, M, V, options, with_grad);
}

}  // namespace

EXPORT(cross_entropy,
       (T* logits, const i64* targets, float* losses, i64* hits, i64 M, i64 V, float smoothing, float softcap, float z_loss, i64 with_grad),
       (logits, targets, losses, hits, M, V, smoothing, softcap, z_loss, with_grad))
