// What a transformer does between its matrix products, for inference: attention among few tokens, and the activation of
// its MLP with the bias before it; what they mean: grcsf_fast/ops/plain.py.
//
// With a few hundred tokens at most, a head's logits stay in the caches, so nothing is gained by softmax in pieces.

#include "kernels.h"
#include "simd.h"

namespace {

using namespace grcsf;

constexpr ptrdiff_t rows_at_once = 48;

// One head of one image; numbers of the accumulation type in working memory.
template <class S> struct Head {
    using A = typename Accumulate<S>::type;
    using V = Vector<A>;
    const AttentionForward &call;
    const ptrdiff_t width, tokens, wide_tokens, wide_width;
    A *keys;     // (width, wide_tokens)
    A *values;   // (tokens, wide_width)
    A *queries;  // (rows_at_once, width)
    A *logits;   // (rows_at_once, wide_tokens)
    A *results;  // (rows_at_once, wide_width)

    static ptrdiff_t numbers(const AttentionForward &call) {
        const ptrdiff_t width = call.width, wide_tokens = padded(call.tokens), wide_width = padded(width);
        return (width + rows_at_once) * wide_tokens + (call.tokens + rows_at_once) * wide_width +
               padded(rows_at_once * width);
    }

    Head(const AttentionForward &of, A *memory)
        : call(of), width(of.width), tokens(of.tokens), wide_tokens(padded(of.tokens)), wide_width(padded(of.width)),
          keys(memory), values(keys + width * wide_tokens), queries(values + tokens * wide_width),
          logits(queries + padded(rows_at_once * width)), results(logits + rows_at_once * wide_tokens) {}

    void run(ptrdiff_t image, ptrdiff_t head) {
        const S *key = static_cast<const S *>(call.keys) + image * call.key_image + head * width;
        const S *value = static_cast<const S *>(call.values) + image * call.value_image + head * width;
        const S *query = static_cast<const S *>(call.queries) + image * call.query_image + head * width;
        S *out = static_cast<S *>(call.out) + (image * call.wanted * call.heads + head) * width;
        const A scale = A(1) / std::sqrt(A(width));
        // Rows become wide where `values` will be, then columns.
        for (ptrdiff_t t = 0; t < tokens; ++t)
            convert_row(values + t * wide_width, key + t * call.key_row, width);
        transpose(keys, wide_tokens, values, wide_width, tokens, width);
        for (ptrdiff_t c = 0; c < width; ++c)
            for (ptrdiff_t t = tokens; t < wide_tokens; ++t)
                keys[c * wide_tokens + t] = 0;
        for (ptrdiff_t t = 0; t < tokens; ++t) {
            convert_row(values + t * wide_width, value + t * call.value_row, width);
            for (ptrdiff_t c = width; c < wide_width; ++c)
                values[t * wide_width + c] = 0;
        }
        for (ptrdiff_t first = 0; first < call.wanted; first += rows_at_once) {
            const ptrdiff_t rows = call.wanted - first < rows_at_once ? call.wanted - first : rows_at_once;
            for (ptrdiff_t r = 0; r < rows; ++r) {
                const S *from = query + (first + r) * call.query_row;
                for (ptrdiff_t c = 0; c < width; ++c)
                    queries[r * width + c] = scale * widen(from[c]);
            }
            multiply<A, Start::zero>(
                rows, wide_tokens, width,
                {queries, width, 1, keys, wide_tokens, logits, wide_tokens, nullptr, 0});
            A shares[rows_at_once];
            for (ptrdiff_t r = 0; r < rows; ++r)
                shares[r] = A(1) / exponentiate(logits + r * wide_tokens);
            multiply<A, Start::zero>(
                rows, wide_width, tokens,
                {logits, wide_tokens, 1, values, wide_width, results, wide_width, nullptr, 0});
            for (ptrdiff_t r = 0; r < rows; ++r)
                for (ptrdiff_t c = 0; c < width; ++c)
                    convert(
                        out[(first + r) * call.heads * width + c], A(shares[r] * results[r * wide_width + c]));
        }
    }

    // exp(logit - largest) in place, and their sum.
    A exponentiate(A *row) const {
        constexpr int n = lanes<A>;
        ptrdiff_t whole = tokens / n * n;
        A largest = row[0];
        if (whole) {
            V most = load(row);
            for (ptrdiff_t t = n; t < whole; t += n) {
                const V other = load(row + t);
                most = other > most ? other : most;
            }
            for (int k = 0; k < n; ++k)
                largest = most[k] > largest ? most[k] : largest;
        }
        for (ptrdiff_t t = whole; t < tokens; ++t)
            largest = row[t] > largest ? row[t] : largest;
        V total{};
        for (ptrdiff_t t = 0; t < whole; t += n) {
            const V found = exponential(load(row + t) - largest);
            store(row + t, found);
            total += found;
        }
        A all = sum<A>(total);
        if (whole < tokens) {
            // What lies beyond is padding, whose logits are 0.
            const V found = exponential(load(row + whole) - largest);
            for (ptrdiff_t t = whole; t < tokens; ++t)
                all += row[t] = found[t - whole];
        }
        return all;
    }
};

template <class S> void attend(const AttentionForward &call) {
    using A = typename Accumulate<S>::type;
    const Scratch<A> scratch(Head<S>::numbers(call), call.threads);
    each(call.threads, call.batch * call.heads, [&](ptrdiff_t unit, int thread) {
        Head<S>(call, scratch.of(thread)).run(unit / call.heads, unit % call.heads);
    });
}

// x times the normal distribution's function of x.
inline Vector<double> gelu(Vector<double> x) {
    for (int k = 0; k < lanes<double>; ++k)
        x[k] *= 0.5 * std::erfc(-x[k] * M_SQRT1_2);
    return x;
}
// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: off by 1.5e-7 at most.
inline Vector<float> gelu(Vector<float> x) {
    using V = Vector<float>;
    const V size = (x < V{} ? -x : x) * float(M_SQRT1_2);
    const V t = 1.0f / (1.0f + 0.3275911f * size);
    V p = broadcast(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const V beyond = 0.5f * p * t * exponential(-size * size);
    return x * (x < V{} ? beyond : 1.0f - beyond);
}

template <class S> void bias_gelu(const BiasGeluForward &call) {
    using A = typename Accumulate<S>::type;
    const Scratch<A> scratch(padded(call.columns), call.threads);
    each(call.threads, call.rows, [&](ptrdiff_t row, int thread) {
        constexpr ptrdiff_t n = lanes<A>;
        const ptrdiff_t whole = call.columns / n * n;
        const A *bias = static_cast<const A *>(call.bias);
        S *stored = static_cast<S *>(call.x) + row * call.columns;
        A *wide = scratch.of(thread);
        const A *x = wide_row<S, A>(stored, wide, call.columns);
        for (ptrdiff_t c = 0; c < whole; c += n)
            store(wide + c, gelu(load(x + c) + load(bias + c)));
        if (whole < call.columns) {
            Vector<A> rest{};
            for (ptrdiff_t c = whole; c < call.columns; ++c)
                rest[c - whole] = x[c] + bias[c];
            rest = gelu(rest);
            for (ptrdiff_t c = whole; c < call.columns; ++c)
                wide[c] = rest[c - whole];
        }
        convert_row(stored, wide, call.columns);
    });
}

}  // namespace

namespace grcsf {
namespace GRCSF_ISA {
void (*const attention_forward[dtypes])(const AttentionForward &) = {attend<float>, attend<bfloat16>, attend<double>};
void (*const bias_gelu_forward[dtypes])(const BiasGeluForward &) = {
    bias_gelu<float>, bias_gelu<bfloat16>, bias_gelu<double>};
}  // namespace GRCSF_ISA
}  // namespace grcsf
