// What stands between the convolutions: instance normalisation with its activation, and pooling, forward and backward;
// what they mean: grcsf_fast/ops/plain.py.
//
// A plane is one channel of one image. Its mean, its variance around that mean and the scaled and rectified result are
// three passes over a plane that the caches hold, where separate operations read and write memory five times. The
// backward makes what was normalised again from x, so nothing but x is kept for it, and sums before it writes.

#include "kernels.h"
#include "simd.h"

namespace {

using namespace grcsf;

// Sums of several chains, so that additions need not wait for each other; the order is that of the numbers alone. What a
// chain has goes to a double after a few additions: in a long one of equal numbers, as air has, every addition is rounded
// the same way.
template <class A, class Value> inline A chained_sum(ptrdiff_t count, const Value &value) {
    constexpr ptrdiff_t chains = 64 / ptrdiff_t(sizeof(A)) * 4, block = 32 * chains;
    double totals[chains] = {};
    for (ptrdiff_t first = 0; first < count; first += block) {
        const ptrdiff_t end = count - first < block ? count : first + block;
        A sums[chains] = {};
        ptrdiff_t i = first;
        for (; i + chains <= end; i += chains)
GRCSF_INDEPENDENT
            for (ptrdiff_t k = 0; k < chains; ++k)
                sums[k] += value(i + k);
        for (; i < end; ++i)
            sums[i % chains] += value(i);
GRCSF_INDEPENDENT
        for (ptrdiff_t k = 0; k < chains; ++k)
            totals[k] += double(sums[k]);
    }
    for (ptrdiff_t step = chains / 2; step > 0; step /= 2)
        for (ptrdiff_t k = 0; k < step; ++k)
            totals[k] += totals[k + step];
    return A(totals[0]);
}

// Threads that have something to do, which alone have scratch.
inline int busy(ptrdiff_t planes, int threads) { return planes > threads ? threads : planes > 1 ? int(planes) : 1; }

template <class S> void normalise(const NormForward &call) {
    using A = typename Accumulate<S>::type;
    const ptrdiff_t planes = call.batch * call.channels;
    const Scratch<A> scratch(std::is_same_v<S, A> ? 16 : call.pixels, busy(planes, call.threads));
    each(call.threads, planes, [&](ptrdiff_t plane, int thread) {
        const ptrdiff_t count = call.pixels;
        const A eps = A(call.eps), slope = A(call.slope);
        const S *from = static_cast<const S *>(call.x) + plane * count;
        S *to = static_cast<S *>(call.out) + plane * count;
        const A *wide = wide_row<S, A>(from, scratch.of(thread), count);
        const A mean = chained_sum<A>(count, [=](ptrdiff_t i) { return wide[i]; }) / A(count);
        const A variance = chained_sum<A>(count, [=](ptrdiff_t i) {
            const A rest = wide[i] - mean;
            return rest * rest;
        }) / A(count);
        const ptrdiff_t channel = plane % call.channels, image = plane / call.channels;
        const A deviation = std::sqrt(variance + eps);
        if (call.statistics) {
            A *statistics = static_cast<A *>(call.statistics) + 2 * image * call.channels + channel;
            statistics[0] = mean, statistics[call.channels] = deviation;
        }
        const A scale = static_cast<const A *>(call.weight)[channel] / deviation;
        const A shift = static_cast<const A *>(call.bias)[channel] - mean * scale;
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < count; ++i) {
            const A value = wide[i] * scale + shift;
            convert(to[i], value < 0 ? value * slope : value);
        }
    });
}

// With n = (x - mean) / deviation and g the gradient before the activation:
//     bias' = sum g,  weight' = sum g n,  x' = weight / deviation (g - mean of g - n times the mean of g n).
template <class S> void normalise_backward(const NormBackward &call) {
    using A = typename Accumulate<S>::type;
    const ptrdiff_t planes = call.batch * call.channels;
    const Scratch<A> scratch(call.pixels, busy(planes, call.threads));
    each(call.threads, planes, [&](ptrdiff_t plane, int thread) {
        const ptrdiff_t count = call.pixels;
        const A slope = A(call.slope);
        const S *x = static_cast<const S *>(call.x) + plane * count;
        const S *out_grad = static_cast<const S *>(call.out_grad) + plane * count;
        S *to = static_cast<S *>(call.x_grad) + plane * count;
        const ptrdiff_t channel = plane % call.channels, image = plane / call.channels;
        const A *statistics = static_cast<const A *>(call.statistics) + 2 * image * call.channels + channel;
        const A mean = statistics[0], deviation = statistics[call.channels];
        // As in the forward, to the bit, so that the same pixels are below 0.
        const A scale = static_cast<const A *>(call.weight)[channel] / deviation;
        const A shift = static_cast<const A *>(call.bias)[channel] - mean * scale;
        A *before = scratch.of(thread);
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < count; ++i) {
            const A grad = widen(out_grad[i]);
            before[i] = widen(x[i]) * scale + shift > 0 ? grad : grad * slope;
        }
        const A total = chained_sum<A>(count, [=](ptrdiff_t i) { return before[i]; });
        const A along = chained_sum<A>(count, [=](ptrdiff_t i) { return before[i] * (widen(x[i]) - mean); }) / deviation;
        static_cast<A *>(call.bias_parts)[plane] = total;
        static_cast<A *>(call.weight_parts)[plane] = along;
        const A level = total / A(count), slant = along / (A(count) * deviation);
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < count; ++i)
            convert(to[i], scale * (before[i] - level - (widen(x[i]) - mean) * slant));
    });
}

// NaN wins, as in PyTorch.
template <class A> inline A greater(A a, A b) { return a > b || a != a ? a : b; }

template <class S> void pool(const PoolForward &call) {
    using A = typename Accumulate<S>::type;
    const ptrdiff_t rows = call.planes * (call.planar ? call.depth : call.depth / 2) * (call.height / 2);
    const Scratch<A> scratch(2 * call.width, call.threads);
    each(call.threads, rows, [&](ptrdiff_t row, int thread) {
        const ptrdiff_t height = call.height, width = call.width, half = width / 2;
        const ptrdiff_t behind = call.planar ? 0 : height * width;
        const A share = call.planar ? A(0.25) : A(0.125);
        const ptrdiff_t y = row % (height / 2), z = row / (height / 2);  // z counts planes of all images
        const S *from = static_cast<const S *>(call.x) + (z * (call.planar ? 1 : 2) * height + 2 * y) * width;
        A *tallest = scratch.of(thread), *total = tallest + width;
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < width; ++i) {
            const A a = widen(from[i]), b = widen(from[i + width]);
            tallest[i] = greater<A>(a, b), total[i] = a + b;
        }
        if (behind)
GRCSF_INDEPENDENT
            for (ptrdiff_t i = 0; i < width; ++i) {
                const A a = widen(from[i + behind]), b = widen(from[i + behind + width]);
                tallest[i] = greater<A>(tallest[i], greater<A>(a, b)), total[i] += a + b;
            }
        S *to = static_cast<S *>(call.out) + row * half;
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < half; ++i)
            convert(to[i], greater<A>(tallest[2 * i], tallest[2 * i + 1]));
        if (!call.mean)
            return;
        to = static_cast<S *>(call.mean) + row * half;
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < half; ++i)
            convert(to[i], share * (total[2 * i] + total[2 * i + 1]));
    });
}

// Of one row of coarse pixels, whose 2 (or 4) rows of fine pixels lie `starts` after x and to.
template <class S, int Rows>
inline void pool_gradient_row(
    const S *x, S *to, const ptrdiff_t (&starts)[Rows], const S *largest, const S *mean, ptrdiff_t half) {
    using A = typename Accumulate<S>::type;
    constexpr A share = A(1) / (2 * Rows);
GRCSF_INDEPENDENT
    for (ptrdiff_t i = 0; i < half; ++i) {
        A values[2 * Rows];
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
            values[2 * row] = widen(x[starts[row] + 2 * i]);
            values[2 * row + 1] = widen(x[starts[row] + 2 * i + 1]);
        }
        A most = values[0];
        int at = 0;
#pragma GCC unroll 8
        for (int corner = 1; corner < 2 * Rows; ++corner) {
            const bool wins = values[corner] > most || values[corner] != values[corner];
            most = wins ? values[corner] : most;
            at = wins ? corner : at;
        }
        const A part = widen(mean[i]) * share, whole = widen(largest[i]) + part;
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
            convert(to[starts[row] + 2 * i], at == 2 * row ? whole : part);
            convert(to[starts[row] + 2 * i + 1], at == 2 * row + 1 ? whole : part);
        }
    }
}

template <class S> void pool_gradient(const PoolBackward &call) {
    const ptrdiff_t height = call.height, width = call.width, half = width / 2, behind = height * width;
    const ptrdiff_t rows = call.planes * (call.planar ? call.depth : call.depth / 2) * (height / 2);
    each(call.threads, rows, [=](ptrdiff_t row, int) {
        const ptrdiff_t y = row % (height / 2), z = row / (height / 2);  // z counts planes of all images
        const ptrdiff_t first = (z * (call.planar ? 1 : 2) * height + 2 * y) * width;
        const S *x = static_cast<const S *>(call.x) + first;
        S *to = static_cast<S *>(call.x_grad) + first;
        const S *largest = static_cast<const S *>(call.largest_grad) + row * half;
        const S *mean = static_cast<const S *>(call.mean_grad) + row * half;
        if (call.planar)
            pool_gradient_row<S, 2>(x, to, {0, width}, largest, mean, half);
        else
            pool_gradient_row<S, 4>(x, to, {0, width, behind, behind + width}, largest, mean, half);
    });
}

}  // namespace

namespace grcsf {
namespace GRCSF_ISA {
void (*const norm_backward[dtypes])(const NormBackward &) = {
    normalise_backward<float>, normalise_backward<bfloat16>, normalise_backward<double>};
void (*const pool_backward[dtypes])(const PoolBackward &) = {
    pool_gradient<float>, pool_gradient<bfloat16>, pool_gradient<double>};
void (*const norm_forward[dtypes])(const NormForward &) = {normalise<float>, normalise<bfloat16>, normalise<double>};
void (*const pool_forward[dtypes])(const PoolForward &) = {pool<float>, pool<bfloat16>, pool<double>};
}  // namespace GRCSF_ISA
}  // namespace grcsf
