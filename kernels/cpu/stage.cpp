// What stands between the convolutions, for inference: instance normalisation with its activation, and pooling; what
// they mean: grcsf_fast/reference.py.
//
// A plane is one channel of one image. Its mean, its variance around that mean and the scaled and rectified result are
// three passes over a plane that the caches hold, where separate operations read and write memory five times.

#include "kernels.h"
#include "simd.h"

namespace {

using namespace grcsf;

// Sums of several chains, so that additions need not wait for each other; the order is that of the numbers alone.
template <class A, class Value> inline A chained_sum(ptrdiff_t count, const Value &value) {
    constexpr ptrdiff_t chains = 64 / ptrdiff_t(sizeof(A)) * 4;
    A sums[chains] = {};
    ptrdiff_t i = 0;
    for (; i + chains <= count; i += chains)
#pragma GCC ivdep
        for (ptrdiff_t k = 0; k < chains; ++k)
            sums[k] += value(i + k);
    for (; i < count; ++i)
        sums[i % chains] += value(i);
    for (ptrdiff_t step = chains / 2; step > 0; step /= 2)
        for (ptrdiff_t k = 0; k < step; ++k)
            sums[k] += sums[k + step];
    return sums[0];
}

template <class S> void normalise(const NormForward &call) {
    using A = typename Accumulate<S>::type;
    const ptrdiff_t planes = call.batch * call.channels, count = call.pixels;
    const A eps = A(call.eps), slope = A(call.slope);
    const Scratch<A> scratch(std::is_same_v<S, A> ? 16 : count, call.threads);
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (ptrdiff_t plane = 0; plane < planes; ++plane) {
        const S *from = static_cast<const S *>(call.x) + plane * count;
        S *to = static_cast<S *>(call.out) + plane * count;
        const A *wide = wide_row<S, A>(from, scratch.mine(), count);
        const A mean = chained_sum<A>(count, [=](ptrdiff_t i) { return wide[i]; }) / A(count);
        const A variance = chained_sum<A>(count, [=](ptrdiff_t i) {
            const A rest = wide[i] - mean;
            return rest * rest;
        }) / A(count);
        const ptrdiff_t channel = plane % call.channels;
        const A scale = static_cast<const A *>(call.weight)[channel] / std::sqrt(variance + eps);
        const A shift = static_cast<const A *>(call.bias)[channel] - mean * scale;
#pragma GCC ivdep
        for (ptrdiff_t i = 0; i < count; ++i) {
            const A value = wide[i] * scale + shift;
            convert(to[i], value < 0 ? value * slope : value);
        }
    }
}

// NaN wins, as in PyTorch.
template <class A> inline A greater(A a, A b) { return a > b || a != a ? a : b; }

template <class S> void pool(const PoolForward &call) {
    using A = typename Accumulate<S>::type;
    const ptrdiff_t height = call.height, width = call.width, half = width / 2;
    const ptrdiff_t depth = call.planar ? call.depth : call.depth / 2, behind = call.planar ? 0 : height * width;
    const ptrdiff_t rows = call.planes * depth * (height / 2);
    const A share = call.planar ? A(0.25) : A(0.125);
    const Scratch<A> scratch(2 * width, call.threads);
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (ptrdiff_t row = 0; row < rows; ++row) {
        const ptrdiff_t y = row % (height / 2), z = row / (height / 2);  // z counts planes of all images
        const S *from = static_cast<const S *>(call.x) + (z * (call.planar ? 1 : 2) * height + 2 * y) * width;
        A *tallest = scratch.mine(), *total = tallest + width;
#pragma GCC ivdep
        for (ptrdiff_t i = 0; i < width; ++i) {
            const A a = widen(from[i]), b = widen(from[i + width]);
            tallest[i] = greater<A>(a, b), total[i] = a + b;
        }
        if (behind)
#pragma GCC ivdep
            for (ptrdiff_t i = 0; i < width; ++i) {
                const A a = widen(from[i + behind]), b = widen(from[i + behind + width]);
                tallest[i] = greater<A>(tallest[i], greater<A>(a, b)), total[i] += a + b;
            }
        S *to = static_cast<S *>(call.out) + row * half;
#pragma GCC ivdep
        for (ptrdiff_t i = 0; i < half; ++i)
            convert(to[i], greater<A>(tallest[2 * i], tallest[2 * i + 1]));
        if (!call.mean)
            continue;
        to = static_cast<S *>(call.mean) + row * half;
#pragma GCC ivdep
        for (ptrdiff_t i = 0; i < half; ++i)
            convert(to[i], share * (total[2 * i] + total[2 * i + 1]));
    }
}

}  // namespace

namespace grcsf {
namespace GRCSF_ISA {
void (*const norm_forward[dtypes])(const NormForward &) = {normalise<float>, normalise<bfloat16>, normalise<double>};
void (*const pool_forward[dtypes])(const PoolForward &) = {pool<float>, pool<bfloat16>, pool<double>};
}  // namespace GRCSF_ISA
}  // namespace grcsf
