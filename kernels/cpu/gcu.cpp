// Global compensation, forward and backward; what it means: grcsf_fast/reference.py.
//
// A tile is some rows of one image, small enough that its channels stay in the second-level cache. The first pass over
// a tile's channels makes three sums a pixel, the second scales; the features come from memory once. Coarse features
// are up-sampled on the way and never stored as an image.

#include "kernels.h"
#include "simd.h"

#include <type_traits>

namespace {

using namespace grcsf;

constexpr ptrdiff_t tile_pixels = 512;
// The two coarse neighbours of fine row i and their weights, as in F.interpolate(align_corners=False).
template <class A> struct Neighbours {
    Neighbours(ptrdiff_t i, ptrdiff_t coarse_size) {
        if (i == 0) {
            index[0] = 0, index[1] = coarse_size > 1;
            weight[0] = 1, weight[1] = 0;
            return;
        }
        index[0] = (i - 1) / 2;
        index[1] = index[0] + (index[0] + 1 < coarse_size);
        weight[0] = i % 2 ? A(0.75) : A(0.25);
        weight[1] = 1 - weight[0];
    }
    ptrdiff_t index[2];
    A weight[2];
};

// Up to four coarse rows that make one fine row, before the interpolation along the row.
template <class A> struct Sources {
    Sources(const GcuShape &shape, ptrdiff_t z, ptrdiff_t y) {
        const ptrdiff_t rows = shape.height / 2;
        const Neighbours<A> below(y, rows);
        if (shape.planar) {
            count = 2;
            for (int j = 0; j < 2; ++j)
                row[j] = below.index[j], weight[j] = below.weight[j];
            return;
        }
        const Neighbours<A> behind(z, shape.depth / 2);
        count = 4;
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) {
                row[2 * i + j] = behind.index[i] * rows + below.index[j];
                weight[2 * i + j] = behind.weight[i] * below.weight[j];
            }
    }
    int count;
    ptrdiff_t row[4];
    A weight[4];
};

// A row of storage as a row to compute with; `buffer` is filled only where the two differ.
template <class S, class A> inline const A *wide_row(const S *from, A *buffer, ptrdiff_t count) {
    if constexpr (std::is_same_v<S, A>) {
        return from;
    } else {
        convert_row(buffer, from, count);
        return buffer;
    }
}

template <class S> struct Gcu {
    using A = typename Accumulate<S>::type;
    static constexpr bool same = std::is_same_v<S, A>;

    static ptrdiff_t coarse_rows(const GcuShape &of) { return (of.planar ? 1 : of.depth / 2) * (of.height / 2); }
    static ptrdiff_t rows_a_tile(const GcuShape &of) {
        const ptrdiff_t rows = tile_pixels / of.width;
        return rows < 1 ? 1 : rows > of.height ? of.height : rows;
    }

    // `rows` fine rows of one channel from row (z, y) on: to (rows * width). `halves` holds as many numbers.
    static void upsample(
        const GcuShape &shape, const S *coarse, ptrdiff_t z, ptrdiff_t y, ptrdiff_t rows, A *__restrict halves,
        A *__restrict to) {
        const ptrdiff_t half = shape.width / 2;
        for (ptrdiff_t r = 0; r < rows; ++r) {
            const Sources<A> from(shape, z, y + r);
            A *__restrict row = halves + r * half;
            const S *__restrict first = coarse + from.row[0] * half;
            const S *__restrict second = coarse + from.row[1] * half;
            const A u = from.weight[0], v = from.weight[1];
            if (from.count == 2) {
                for (ptrdiff_t j = 0; j < half; ++j)
                    row[j] = u * widen(first[j]) + v * widen(second[j]);
            } else {
                const S *__restrict third = coarse + from.row[2] * half;
                const S *__restrict fourth = coarse + from.row[3] * half;
                const A s = from.weight[2], t = from.weight[3];
                for (ptrdiff_t j = 0; j < half; ++j)
                    row[j] = u * widen(first[j]) + v * widen(second[j]) + (s * widen(third[j]) + t * widen(fourth[j]));
            }
        }
        // Along the rows, across their ends as well; the ends are put right below.
        const ptrdiff_t count = rows * half;
        for (ptrdiff_t j = 1; j < count - 1; ++j) {
            to[2 * j] = A(0.25) * halves[j - 1] + A(0.75) * halves[j];
            to[2 * j + 1] = A(0.75) * halves[j] + A(0.25) * halves[j + 1];
        }
        for (ptrdiff_t r = 0; r < rows; ++r) {
            const A *row = halves + r * half;
            A *fine = to + r * shape.width;
            const ptrdiff_t next = half > 1;
            fine[0] = row[0] + 0 * row[next];
            fine[1] = A(0.75) * row[0] + A(0.25) * row[next];
            if (half > 1) {
                fine[shape.width - 2] = A(0.25) * row[half - 2] + A(0.75) * row[half - 1];
                fine[shape.width - 1] = row[half - 1];
            }
        }
    }

    // The transpose of the interpolation along the rows: (rows * width) -> (rows * half).
    static void gather_halves(ptrdiff_t width, ptrdiff_t rows, const A *__restrict fine, A *__restrict halves) {
        const ptrdiff_t half = width / 2, count = rows * half;
        for (ptrdiff_t j = 1; j < count - 1; ++j)
            halves[j] = A(0.25) * (fine[2 * j - 1] + fine[2 * j + 2]) + A(0.75) * (fine[2 * j] + fine[2 * j + 1]);
        for (ptrdiff_t r = 0; r < rows; ++r) {
            const A *from = fine + r * width;
            A *row = halves + r * half;
            if (half == 1) {
                row[0] = from[0] + from[1];
                continue;
            }
            row[0] = from[0] + A(0.75) * from[1] + A(0.25) * from[2];
            row[half - 1] = A(0.25) * from[width - 3] + A(0.75) * from[width - 2] + from[width - 1];
        }
    }

    static void forward(const GcuForward &call) {
        const GcuShape &shape = call.shape;
        const ptrdiff_t plane = shape.height * shape.width, pixels = shape.depth * plane;
        const ptrdiff_t coarse_pixels = coarse_rows(shape) * (shape.width / 2);
        const ptrdiff_t rows = rows_a_tile(shape), tiles = (shape.height + rows - 1) / rows;
        const ptrdiff_t most = rows * shape.width;
        const A floor = floor_of(call.eps);
        const Scratch<A> scratch(6 * most);
#pragma omp parallel for collapse(3) schedule(static)
        for (ptrdiff_t b = 0; b < shape.batch; ++b)
            for (ptrdiff_t z = 0; z < shape.depth; ++z)
                for (ptrdiff_t tile = 0; tile < tiles; ++tile) {
                    const ptrdiff_t y = tile * rows;
                    const ptrdiff_t count = (y + rows > shape.height ? shape.height - y : rows) * shape.width;
                    const ptrdiff_t at = z * plane + y * shape.width;
                    const S *features = static_cast<const S *>(call.features) + b * shape.channels * pixels + at;
                    const S *coarse = static_cast<const S *>(call.coarse) + b * shape.channels * coarse_pixels;
                    const A *a = static_cast<const A *>(call.feature_gate) + b * shape.channels;
                    const A *g = static_cast<const A *>(call.coarse_gate) + b * shape.channels;
                    S *out = static_cast<S *>(call.compensated) + b * shape.channels * pixels + at;
                    S *residual = static_cast<S *>(call.residual) + b * pixels + at;
                    A *__restrict dot = scratch.mine(), *__restrict uu = dot + most, *__restrict vv = uu + most;
                    A *__restrict up = vv + most, *halves = up + most, *wide = halves + most;
                    std::memset(dot, 0, size_t(3 * most) * sizeof(A));
                    for (ptrdiff_t c = 0; c < shape.channels; ++c) {
                        upsample(shape, coarse + c * coarse_pixels, z, y, count / shape.width, halves, up);
                        const A *__restrict f = wide_row(features + c * pixels, wide, count);
                        const A ac = a[c], gc = g[c];
                        for (ptrdiff_t i = 0; i < count; ++i) {
                            const A u = ac * f[i], v = gc * up[i];
                            dot[i] += u * v;
                            uu[i] += u * u;
                            vv[i] += v * v;
                        }
                    }
                    // From here on `dot` holds 1 + residual.
                    for (ptrdiff_t i = 0; i < count; ++i) {
                        const A energy = uu[i] * vv[i];
                        const A r = 1 - dot[i] / std::sqrt(energy < floor ? floor : energy);
                        residual[i] = narrow<S>(r);
                        dot[i] = 1 + r;
                    }
                    for (ptrdiff_t c = 0; c < shape.channels; ++c) {
                        const S *__restrict f = features + c * pixels;
                        S *__restrict o = out + c * pixels;
                        for (ptrdiff_t i = 0; i < count; ++i)
                            o[i] = narrow<S>(widen(f[i]) * dot[i]);
                    }
                }
    }

    static A floor_of(double eps) {
        const A least = std::numeric_limits<A>::min(), square = A(eps * eps);
        return square < least ? least : square;
    }

    // Where a part of the backward lies: the coarse rows it owns, and the fine rows that reach them.
    struct Unit {
        Unit(const GcuShape &shape, ptrdiff_t part) {
            const ptrdiff_t length = shape.planar ? shape.height / 2 : shape.depth / 2;
            const ptrdiff_t step = shape.planar ? unit_rows : unit_planes;
            first = part * step;
            last = first + step < length ? first + step : length;
            fine_first = first ? 2 * first - 1 : 0;
            fine_last = last < length ? 2 * last + 1 : 2 * length;
        }
        bool owns(ptrdiff_t fine) const { return 2 * first <= fine && fine < 2 * last; }
        ptrdiff_t first, last, fine_first, fine_last;
    };

    static void backward(const GcuBackward &call) {
        const GcuShape &shape = call.shape;
        const ptrdiff_t parts = gcu_units_an_image(shape);
        const ptrdiff_t plane = shape.height * shape.width, pixels = shape.depth * plane;
        const ptrdiff_t half = shape.width / 2, coarse_pixels = coarse_rows(shape) * half;
        const ptrdiff_t rows = rows_a_tile(shape), most = rows * shape.width;
        // Channels' up-sampled rows of a tile, and, where they are rounded on their way out, a unit's coarse gradient.
        const ptrdiff_t owned = shape.planar ? unit_rows * half : unit_planes * (shape.height / 2) * half;
        const bool coarse_wanted = call.coarse_grad != nullptr;
        const Scratch<A> scratch((8 + shape.channels) * most + (coarse_wanted && !same ? shape.channels * owned : 0));
#pragma omp parallel for collapse(2) schedule(static)
        for (ptrdiff_t b = 0; b < shape.batch; ++b)
            for (ptrdiff_t part = 0; part < parts; ++part)
                backward_unit(call, b, part, b * parts + part, pixels, coarse_pixels, rows, owned, scratch.mine());
    }

    static void backward_unit(
        const GcuBackward &call, ptrdiff_t b, ptrdiff_t part, ptrdiff_t unit_number, ptrdiff_t pixels,
        ptrdiff_t coarse_pixels, ptrdiff_t rows, ptrdiff_t owned, A *scratch) {
        const GcuShape &shape = call.shape;
        const Unit unit(shape, part);
        const ptrdiff_t channels = shape.channels, half = shape.width / 2, most = rows * shape.width;
        const ptrdiff_t coarse_row_a_step = shape.planar ? 1 : shape.height / 2;
        A *gate_parts = static_cast<A *>(call.feature_gate_parts);
        A *coarse_gate_parts = static_cast<A *>(call.coarse_gate_parts);
        gate_parts += gate_parts ? unit_number * channels : 0;
        coarse_gate_parts += coarse_gate_parts ? unit_number * channels : 0;
        if (gate_parts)
            std::memset(gate_parts, 0, size_t(channels) * sizeof(A));
        if (coarse_gate_parts)
            std::memset(coarse_gate_parts, 0, size_t(channels) * sizeof(A));
        // The coarse gradient of the rows owned: in place, or in the scratch until it is rounded.
        A *sums = nullptr;
        ptrdiff_t sums_channel = coarse_pixels;
        if (call.coarse_grad) {
            const ptrdiff_t origin = b * channels * coarse_pixels + unit.first * coarse_row_a_step * half;
            if constexpr (same) {
                sums = static_cast<A *>(call.coarse_grad) + origin;
            } else {
                sums = scratch + (8 + channels) * most;
                sums_channel = owned;
            }
            const ptrdiff_t count = (unit.last - unit.first) * coarse_row_a_step * half;
            for (ptrdiff_t c = 0; c < channels; ++c)
                std::memset(sums + c * sums_channel, 0, size_t(count) * sizeof(A));
        }
        const ptrdiff_t z_first = shape.planar ? 0 : unit.fine_first, z_last = shape.planar ? 1 : unit.fine_last;
        const ptrdiff_t y_first = shape.planar ? unit.fine_first : 0;
        const ptrdiff_t y_last = shape.planar ? unit.fine_last : shape.height;
        for (ptrdiff_t z = z_first; z < z_last; ++z)
            for (ptrdiff_t y = y_first; y < y_last;) {
                // A tile is owned as a whole or not at all.
                ptrdiff_t end = y + rows < y_last ? y + rows : y_last;
                const bool mine = unit.owns(shape.planar ? y : z);
                if (shape.planar && !mine)
                    end = y + 1;
                else if (shape.planar && end > 2 * unit.last)
                    end = 2 * unit.last;
                backward_tile(
                    call, unit, b, z, y, end - y, mine, pixels, coarse_pixels, scratch, most, sums, sums_channel,
                    gate_parts, coarse_gate_parts);
                y = end;
            }
        if constexpr (!same)
            if (call.coarse_grad) {
                const ptrdiff_t origin = b * channels * coarse_pixels + unit.first * coarse_row_a_step * half;
                const ptrdiff_t count = (unit.last - unit.first) * coarse_row_a_step * half;
                for (ptrdiff_t c = 0; c < channels; ++c)
                    convert_row(
                        static_cast<S *>(call.coarse_grad) + origin + c * coarse_pixels, sums + c * sums_channel, count);
            }
    }

    static void backward_tile(
        const GcuBackward &call, const Unit &unit, ptrdiff_t b, ptrdiff_t z, ptrdiff_t y, ptrdiff_t rows, bool mine,
        ptrdiff_t pixels, ptrdiff_t coarse_pixels, A *scratch, ptrdiff_t most, A *sums, ptrdiff_t sums_channel,
        A *gate_parts, A *coarse_gate_parts) {
        const GcuShape &shape = call.shape;
        const ptrdiff_t channels = shape.channels, half = shape.width / 2, count = rows * shape.width;
        const ptrdiff_t at = (z * shape.height + y) * shape.width;
        const S *features = static_cast<const S *>(call.features) + b * channels * pixels + at;
        const S *out_grad = static_cast<const S *>(call.compensated_grad) + b * channels * pixels + at;
        const S *residual_grad = static_cast<const S *>(call.residual_grad) + b * pixels + at;
        const S *coarse = static_cast<const S *>(call.coarse) + b * channels * coarse_pixels;
        const A *a = static_cast<const A *>(call.feature_gate) + b * channels;
        const A *g = static_cast<const A *>(call.coarse_gate) + b * channels;
        S *features_grad = static_cast<S *>(call.features_grad);
        features_grad += features_grad ? b * channels * pixels + at : 0;
        const A floor = floor_of(call.eps);

        A *__restrict dot = scratch, *__restrict uu = dot + most, *__restrict vv = uu + most;
        A *__restrict through = vv + most, *__restrict line = through + most, *__restrict halves = line + most;
        A *wide = halves + most, *wide_grad = wide + most, *ups = wide_grad + most;
        std::memset(dot, 0, size_t(4 * most) * sizeof(A));
        for (ptrdiff_t c = 0; c < channels; ++c) {
            A *__restrict up = ups + c * most;
            upsample(shape, coarse + c * coarse_pixels, z, y, rows, halves, up);
            const A *__restrict f = wide_row(features + c * pixels, wide, count);
            const A *__restrict o = wide_row(out_grad + c * pixels, wide_grad, count);
            const A ac = a[c], gc = g[c];
            for (ptrdiff_t i = 0; i < count; ++i) {
                const A u = ac * f[i], v = gc * up[i];
                dot[i] += u * v;
                uu[i] += u * u;
                vv[i] += v * v;
                through[i] += o[i] * f[i];
            }
        }
        // From here on: dot = gradient of the dot product, uu and vv = twice those of the squares, through = 1 + residual.
        for (ptrdiff_t i = 0; i < count; ++i) {
            const A energy = uu[i] * vv[i];
            const bool floored = energy < floor;
            const A length = std::sqrt(floored ? floor : energy);
            const A cosine = dot[i] / length;
            const A cosine_grad = -(through[i] + widen(residual_grad[i]));
            dot[i] = cosine_grad / length;
            uu[i] = floored ? A(0) : -cosine_grad * cosine / uu[i];
            vv[i] = floored ? A(0) : -cosine_grad * cosine / vv[i];
            through[i] = 2 - cosine;
        }
        for (ptrdiff_t c = 0; c < channels; ++c) {
            const A *__restrict up = ups + c * most;
            const A *__restrict f = wide_row(features + c * pixels, wide, count);
            const A ac = a[c], gc = g[c];
            if (mine && features_grad) {
                const S *__restrict o = out_grad + c * pixels;
                S *__restrict to = features_grad + c * pixels;
                for (ptrdiff_t i = 0; i < count; ++i)
                    to[i] = narrow<S>(
                        widen(o[i]) * through[i] + ac * (dot[i] * (gc * up[i]) + uu[i] * (ac * f[i])));
            }
            if (mine && gate_parts)
                gate_parts[c] += gate_sum(count, dot, uu, up, f, gc, ac);
            if (mine && coarse_gate_parts)
                coarse_gate_parts[c] += gate_sum(count, dot, vv, f, up, ac, gc);
            if (!sums)
                continue;
            for (ptrdiff_t i = 0; i < count; ++i)
                line[i] = gc * (dot[i] * (ac * f[i]) + vv[i] * (gc * up[i]));
            gather_halves(shape.width, rows, line, halves);
            const ptrdiff_t row_origin = unit.first * (shape.planar ? 1 : shape.height / 2);
            const ptrdiff_t row_end = unit.last * (shape.planar ? 1 : shape.height / 2);
            for (ptrdiff_t r = 0; r < rows; ++r) {
                const Sources<A> to(shape, z, y + r);
                const A *__restrict from = halves + r * half;
                for (int k = 0; k < to.count; ++k) {
                    if (to.row[k] < row_origin || to.row[k] >= row_end)
                        continue;
                    A *__restrict sum_row = sums + c * sums_channel + (to.row[k] - row_origin) * half;
                    const A weight = to.weight[k];
                    for (ptrdiff_t j = 0; j < half; ++j)
                        sum_row[j] += weight * from[j];
                }
            }
        }
    }

    // Sum over a tile of (cross * (gate * other) + own * (own_gate * self)) * self.
    static A gate_sum(
        ptrdiff_t count, const A *cross, const A *own, const A *other, const A *self, A other_gate, A own_gate) {
        using V = Vector<A>;
        V total{};
        ptrdiff_t i = 0;
        for (; i + lanes<A> <= count; i += lanes<A>) {
            const V s = load(self + i);
            total += (load(cross + i) * (other_gate * load(other + i)) + load(own + i) * (own_gate * s)) * s;
        }
        A rest = sum<A>(total);
        for (; i < count; ++i)
            rest += (cross[i] * (other_gate * other[i]) + own[i] * (own_gate * self[i])) * self[i];
        return rest;
    }
};

}  // namespace

namespace grcsf {
namespace GRCSF_ISA {
void (*const gcu_forward[dtypes])(const GcuForward &) = {
    Gcu<float>::forward, Gcu<bfloat16>::forward, Gcu<double>::forward};
void (*const gcu_backward[dtypes])(const GcuBackward &) = {
    Gcu<float>::backward, Gcu<bfloat16>::backward, Gcu<double>::backward};
}  // namespace GRCSF_ISA
}  // namespace grcsf
