// Global compensation, forward and backward; what it means: grcsf_fast/reference.py.
//
// A tile is some rows of one image, few enough that all its channels, and their up-sampled coarse features beside them,
// stay in the second-level cache. The first pass over its channels makes three sums a pixel, the second gives back: the
// features come from memory once, and up-sampled coarse features never go there.

#include "kernels.h"
#include "simd.h"

namespace {

using namespace grcsf;

constexpr ptrdiff_t tile_pixels = 1024, tile_numbers = 1 << 17;
// Channels summed at once, so that the sums are loaded and stored less often.
constexpr ptrdiff_t group = 4;

// Bytes of output from which on it is written past the caches; smaller ones the next op may still find there.
constexpr ptrdiff_t stream_from = ptrdiff_t(32) << 20;

// The two coarse neighbours of fine row i and their weights, as in F.interpolate(align_corners=False). A weight of 0 is
// used all the same: 0 times infinity is NaN there as here.
template <class A> struct Neighbours {
    Neighbours(ptrdiff_t i, ptrdiff_t coarse_size) {
        index[0] = i ? (i - 1) / 2 : 0;
        index[1] = index[0] + (index[0] + 1 < coarse_size);
        weight[0] = i ? (i % 2 ? A(0.75) : A(0.25)) : A(1);
        weight[1] = 1 - weight[0];
    }
    ptrdiff_t index[2];
    A weight[2];
};

// Fine rows [y, y + rows) of plane z, and the coarse rows they are made of.
template <class A> struct Tile {
    Tile(const GcuShape &shape, ptrdiff_t z, ptrdiff_t y, ptrdiff_t rows)
        : rows(rows), count(rows * shape.width), at((z * shape.height + y) * shape.width),
          width(shape.width), half(shape.width / 2), planar(shape.planar), planes(planar ? 0 : z, planar ? 1 : shape.depth / 2) {
        const ptrdiff_t coarse_height = shape.height / 2;
        first = Neighbours<A>(y, coarse_height).index[0];
        for (ptrdiff_t r = 0; r < rows; ++r) {
            const Neighbours<A> near(y + r, coarse_height);
            for (int k = 0; k < 2; ++k)
                index[r][k] = near.index[k] - first, weight[r][k] = near.weight[k];
        }
        coarse = index[rows - 1][1] + 1;
        coarse_plane = coarse_height * half;
    }

    // Of one channel, to (rows, width). `flat` holds (coarse, half), `stretched` (coarse, width).
    template <class S> void upsample(const S *from, A *flat, A *stretched, A *to) const {
        const ptrdiff_t numbers = coarse * half;
        const A *halves = flat;
        if (planar) {
            halves = wide_row<S, A>(from + first * half, flat, numbers);
        } else {
            const S *behind = from + planes.index[0] * coarse_plane + first * half;
            const S *before = from + planes.index[1] * coarse_plane + first * half;
            const A u = planes.weight[0], v = planes.weight[1];
GRCSF_INDEPENDENT
            for (ptrdiff_t i = 0; i < numbers; ++i)
                flat[i] = u * widen(behind[i]) + v * widen(before[i]);
        }
        // Along the rows, across their ends as well; the ends are put right below.
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 1; i < numbers - 1; ++i) {
            stretched[2 * i] = A(0.25) * halves[i - 1] + A(0.75) * halves[i];
            stretched[2 * i + 1] = A(0.75) * halves[i] + A(0.25) * halves[i + 1];
        }
        const ptrdiff_t next = half > 1;
        for (ptrdiff_t k = 0; k < coarse; ++k) {
            const A *row = halves + k * half;
            A *fine = stretched + k * width;
            fine[0] = row[0] + 0 * row[next];  // keeps NaN and infinity, as F.interpolate does
            fine[1] = A(0.75) * row[0] + A(0.25) * row[next];
            if (next) {
                fine[width - 2] = A(0.25) * row[half - 2] + A(0.75) * row[half - 1];
                fine[width - 1] = row[half - 1];
            }
        }
        for (ptrdiff_t r = 0; r < rows; ++r, to += width) {
            const A *above = stretched + index[r][0] * width, *below = stretched + index[r][1] * width;
            const A u = weight[r][0], v = weight[r][1];
GRCSF_INDEPENDENT
            for (ptrdiff_t i = 0; i < width; ++i)
                to[i] = u * above[i] + v * below[i];
        }
    }

    // The transpose: adds (rows, width) to the coarse rows [row_first, row_last) of `sums`, counted over the planes.
    void add_transposed(
        const A *from, A *flat, A *stretched, A *sums, ptrdiff_t row_first, ptrdiff_t row_last) const {
        std::memset(stretched, 0, size_t(coarse * width) * sizeof(A));
        for (ptrdiff_t r = 0; r < rows; ++r, from += width)
            for (int k = 0; k < 2; ++k) {
                A *row = stretched + index[r][k] * width;
                const A w = weight[r][k];
GRCSF_INDEPENDENT
                for (ptrdiff_t i = 0; i < width; ++i)
                    row[i] += w * from[i];
            }
        const ptrdiff_t numbers = coarse * half;
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 1; i < numbers - 1; ++i)
            flat[i] = A(0.25) * (stretched[2 * i - 1] + stretched[2 * i + 2]) +
                      A(0.75) * (stretched[2 * i] + stretched[2 * i + 1]);
        for (ptrdiff_t k = 0; k < coarse; ++k) {
            const A *fine = stretched + k * width;
            A *row = flat + k * half;
            if (half == 1) {
                row[0] = fine[0] + fine[1];
                continue;
            }
            row[half - 1] = A(0.25) * fine[width - 3] + A(0.75) * fine[width - 2] + fine[width - 1];
            row[1] += 0 * fine[0];  // likewise
            row[0] = fine[0] + A(0.75) * fine[1] + A(0.25) * fine[2];
        }
        for (int p = 0; p < (planar ? 1 : 2); ++p) {
            const ptrdiff_t origin = planes.index[p] * (coarse_plane / half) + first;
            const A w = planar ? A(1) : planes.weight[p];
            for (ptrdiff_t k = 0; k < coarse; ++k) {
                if (origin + k < row_first || origin + k >= row_last)
                    continue;
                A *row = sums + (origin + k - row_first) * half;
                const A *add = flat + k * half;
GRCSF_INDEPENDENT
                for (ptrdiff_t i = 0; i < half; ++i)
                    row[i] += w * add[i];
            }
        }
    }

    ptrdiff_t rows, count, at, width, half, first, coarse, coarse_plane;
    bool planar;
    Neighbours<A> planes;
    ptrdiff_t index[tile_pixels / 2][2];
    A weight[tile_pixels / 2][2];
};

template <class S> struct Gcu {
    using A = typename Accumulate<S>::type;
    using V = Vector<A>;
    static constexpr bool same = std::is_same_v<S, A>;

    // Sizes that follow from a shape.
    struct Sizes {
        explicit Sizes(const GcuShape &of)
            : plane(of.height * of.width), pixels(of.depth * plane), half(of.width / 2),
              coarse_rows_a_step(of.planar ? 1 : of.height / 2),
              coarse_pixels((of.planar ? 1 : of.depth / 2) * (of.height / 2) * half) {
            ptrdiff_t wanted = tile_numbers / of.channels;
            wanted = wanted > tile_pixels ? tile_pixels : wanted;
            rows = wanted / of.width;
            rows = rows < 1 ? 1 : rows > of.height ? of.height : rows;
            most = padded(rows * of.width);
            // A tile of n rows hangs on at most n / 2 + 2 coarse ones.
            stretched = padded((rows / 2 + 2) * of.width);
            streamed = of.batch * of.channels * pixels * ptrdiff_t(sizeof(S)) >= stream_from;
        }
        bool streamed;
        ptrdiff_t plane, pixels, half, coarse_rows_a_step, coarse_pixels, rows, most, stretched;
    };

    static A floor_of(double eps) {
        const A least = std::numeric_limits<A>::min(), square = A(eps * eps);
        return square < least ? least : square;
    }

    template <ptrdiff_t n>
    static void add_products(
        ptrdiff_t count, const A *const *features, const A *ups, ptrdiff_t most, const A *a, const A *g, A *dot, A *uu,
        A *vv) {
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < count; ++i) {
            A d = dot[i], s = uu[i], t = vv[i];
#pragma GCC unroll 4
            for (ptrdiff_t k = 0; k < n; ++k) {
                const A u = a[k] * features[k][i], v = g[k] * ups[k * most + i];
                d += u * v;
                s += u * u;
                t += v * v;
            }
            dot[i] = d, uu[i] = s, vv[i] = t;
        }
    }

    static void forward(const GcuForward &call) {
        const GcuShape &shape = call.shape;
        const Sizes size(shape);
        const ptrdiff_t tiles = (shape.height + size.rows - 1) / size.rows;
        const A floor = floor_of(call.eps);
        const Scratch<A> scratch((3 + group + shape.channels) * size.most + 2 * size.stretched, call.threads);
        each(call.threads, shape.batch * shape.depth * tiles, [=, &scratch](ptrdiff_t unit, int thread) {
            const ptrdiff_t plane = unit / tiles, y = unit % tiles * size.rows, left = shape.height - y;
            const Tile<A> tile(shape, plane % shape.depth, y, left < size.rows ? left : size.rows);
            forward_tile(call, size, tile, plane / shape.depth, floor, scratch.of(thread));
        });
    }

    static void forward_tile(
        const GcuForward &call, const Sizes &size, const Tile<A> &tile, ptrdiff_t b, A floor, A *scratch) {
        const ptrdiff_t channels = call.shape.channels, count = tile.count;
        const S *features = static_cast<const S *>(call.features) + b * channels * size.pixels + tile.at;
        const S *coarse = static_cast<const S *>(call.coarse) + b * channels * size.coarse_pixels;
        const A *a = static_cast<const A *>(call.feature_gate) + b * channels;
        const A *g = static_cast<const A *>(call.coarse_gate) + b * channels;
        const A *strength = static_cast<const A *>(call.strength);
        S *out = static_cast<S *>(call.compensated) + b * channels * size.pixels + tile.at;
        S *residual = static_cast<S *>(call.residual) + b * size.pixels + tile.at;
        A *dot = scratch, *uu = dot + size.most, *vv = uu + size.most, *wide = vv + size.most;
        A *ups = wide + group * size.most, *flat = ups + channels * size.most, *stretched = flat + size.stretched;
        std::memset(dot, 0, size_t(3 * size.most) * sizeof(A));
        for (ptrdiff_t c = 0; c < channels;) {
            const ptrdiff_t together = c + group <= channels ? group : 1;
            const A *rows[group];
            for (ptrdiff_t k = 0; k < together; ++k) {
                tile.upsample(coarse + (c + k) * size.coarse_pixels, flat, stretched, ups + (c + k) * size.most);
                rows[k] = wide_row<S, A>(features + (c + k) * size.pixels, wide + k * size.most, count);
            }
            (together == group ? add_products<group> : add_products<1>)(
                count, rows, ups + c * size.most, size.most, a + c, g + c, dot, uu, vv);
            c += together;
        }
        A *wide_residual = dot;  // the same memory
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < count; ++i) {
            const A energy = uu[i] * vv[i];
            wide_residual[i] = 1 - dot[i] / std::sqrt(energy < floor ? floor : energy);
        }
        convert_row(residual, wide_residual, count);
        for (ptrdiff_t c = 0; c < channels; ++c) {
            const S *f = features + c * size.pixels;
            const A *up = ups + c * size.most, given = strength[c];
            S *o = size.streamed ? reinterpret_cast<S *>(wide) : out + c * size.pixels;
GRCSF_INDEPENDENT
            for (ptrdiff_t i = 0; i < count; ++i)
                o[i] = narrow<S>(widen(f[i]) + given * wide_residual[i] * (widen(f[i]) - up[i]));
            if (size.streamed)
                stream(out + c * size.pixels, o, count * ptrdiff_t(sizeof(S)));
        }
        if (size.streamed)
            stream_done();
    }

    // A part of the backward: the coarse rows (2-D) or planes (3-D) it owns, and the fine ones that reach them. Fine
    // rows at either end belong to the neighbours and are computed twice.
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

    // What a part adds its gradients to; null where nobody asks.
    struct Sums {
        A *coarse, *feature_gate, *coarse_gate, *strength;
        ptrdiff_t coarse_channel, row_first, row_last;
    };

    static void backward(const GcuBackward &call) {
        const GcuShape &shape = call.shape;
        const Sizes size(shape);
        const ptrdiff_t parts = gcu_units_an_image(shape);
        // Where the coarse gradient is rounded on its way out, a part's sums wait in the scratch.
        const ptrdiff_t owned = (shape.planar ? unit_rows : unit_planes * (shape.height / 2)) * size.half;
        const ptrdiff_t waiting = call.coarse_grad && !same ? shape.channels * owned : 0;
        const ptrdiff_t numbers = (8 + shape.channels) * size.most + 2 * size.stretched;
        const Scratch<A> scratch(numbers + waiting, call.threads);
        each(call.threads, shape.batch * parts, [&](ptrdiff_t unit, int thread) {
            backward_unit(call, size, Unit(shape, unit % parts), unit / parts, unit, owned, scratch.of(thread), numbers);
        });
    }

    static void backward_unit(
        const GcuBackward &call, const Sizes &size, const Unit &unit, ptrdiff_t b, ptrdiff_t number, ptrdiff_t owned,
        A *scratch, ptrdiff_t scratch_used) {
        const GcuShape &shape = call.shape;
        const ptrdiff_t channels = shape.channels;
        const auto gate_part = [&](void *parts) -> A * {
            if (!parts)
                return nullptr;
            A *mine = static_cast<A *>(parts) + number * channels;
            std::memset(mine, 0, size_t(channels) * sizeof(A));
            return mine;
        };
        Sums sums{};
        sums.feature_gate = gate_part(call.feature_gate_parts);
        sums.coarse_gate = gate_part(call.coarse_gate_parts);
        sums.strength = gate_part(call.strength_parts);
        sums.row_first = unit.first * size.coarse_rows_a_step;
        sums.row_last = unit.last * size.coarse_rows_a_step;
        const ptrdiff_t rows = (sums.row_last - sums.row_first) * size.half;
        S *coarse_grad = static_cast<S *>(call.coarse_grad);
        if (coarse_grad) {
            coarse_grad += b * channels * size.coarse_pixels + sums.row_first * size.half;
            if constexpr (same) {
                sums.coarse = coarse_grad, sums.coarse_channel = size.coarse_pixels;
            } else {
                sums.coarse = scratch + scratch_used, sums.coarse_channel = owned;
            }
            for (ptrdiff_t c = 0; c < channels; ++c)
                std::memset(sums.coarse + c * sums.coarse_channel, 0, size_t(rows) * sizeof(A));
        }
        const ptrdiff_t z_first = shape.planar ? 0 : unit.fine_first, z_last = shape.planar ? 1 : unit.fine_last;
        const ptrdiff_t y_first = shape.planar ? unit.fine_first : 0;
        const ptrdiff_t y_last = shape.planar ? unit.fine_last : shape.height;
        for (ptrdiff_t z = z_first; z < z_last; ++z)
            for (ptrdiff_t y = y_first; y < y_last;) {
                // A tile is owned as a whole or not at all.
                const bool mine = unit.owns(shape.planar ? y : z);
                const ptrdiff_t limit = !shape.planar ? y_last : mine ? 2 * unit.last : y + 1;
                const ptrdiff_t end = y + size.rows < limit ? y + size.rows : limit;
                backward_tile(call, size, Tile<A>(shape, z, y, end - y), b, mine, sums, scratch);
                y = end;
            }
        if constexpr (!same)
            if (coarse_grad)
                for (ptrdiff_t c = 0; c < channels; ++c)
                    convert_row(coarse_grad + c * size.coarse_pixels, sums.coarse + c * sums.coarse_channel, rows);
    }

    static void backward_tile(
        const GcuBackward &call, const Sizes &size, const Tile<A> &tile, ptrdiff_t b, bool mine, const Sums &sums,
        A *scratch) {
        const ptrdiff_t channels = call.shape.channels, count = tile.count;
        const S *features = static_cast<const S *>(call.features) + b * channels * size.pixels + tile.at;
        const S *out_grad = static_cast<const S *>(call.compensated_grad) + b * channels * size.pixels + tile.at;
        const S *residual_grad = static_cast<const S *>(call.residual_grad) + b * size.pixels + tile.at;
        const S *coarse = static_cast<const S *>(call.coarse) + b * channels * size.coarse_pixels;
        const A *a = static_cast<const A *>(call.feature_gate) + b * channels;
        const A *g = static_cast<const A *>(call.coarse_gate) + b * channels;
        const A *strength = static_cast<const A *>(call.strength);
        S *features_grad = static_cast<S *>(call.features_grad);
        if (features_grad)
            features_grad += b * channels * size.pixels + tile.at;
        const A floor = floor_of(call.eps);

        A *dot = scratch, *uu = dot + size.most, *vv = uu + size.most, *through = vv + size.most;
        A *line = through + size.most, *grad_line = line + size.most, *wide = grad_line + size.most;
        A *wide_grad = wide + size.most, *ups = wide_grad + size.most, *flat = ups + channels * size.most;
        A *stretched = flat + size.stretched;
        std::memset(dot, 0, size_t(4 * size.most) * sizeof(A));
        for (ptrdiff_t c = 0; c < channels; ++c) {
            const A *up = ups + c * size.most;
            tile.upsample(coarse + c * size.coarse_pixels, flat, stretched, ups + c * size.most);
            const A *f = wide_row<S, A>(features + c * size.pixels, wide, count);
            const A *o = wide_row<S, A>(out_grad + c * size.pixels, wide_grad, count);
            const A ac = a[c], gc = g[c], given = strength[c];
GRCSF_INDEPENDENT
            for (ptrdiff_t i = 0; i < count; ++i) {
                const A u = ac * f[i], v = gc * up[i];
                dot[i] += u * v;
                uu[i] += u * u;
                vv[i] += v * v;
                through[i] += given * o[i] * (f[i] - up[i]);
            }
        }
        convert_row(line, residual_grad, count);
        // The same memory, with other numbers from here on; v is u_in_v times u, and what stands upright on u.
        A *dot_grad = dot, *u_in_v = uu, *v_in_u = vv, *residual = through;
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < count; ++i) {
            const A product = dot[i], energy = uu[i] * vv[i];
            const bool floored = energy < floor;
            const A length = std::sqrt(floored ? floor : energy);
            const A cosine_grad = -(through[i] + line[i]);
            dot_grad[i] = cosine_grad / length;
            u_in_v[i] = floored ? A(0) : product / uu[i];
            v_in_u[i] = floored ? A(0) : product / vv[i];
            residual[i] = 1 - product / length;
        }
        for (ptrdiff_t c = 0; c < channels; ++c) {
            const A *f = wide_row<S, A>(features + c * size.pixels, wide, count);
            const A *o = wide_row<S, A>(out_grad + c * size.pixels, wide_grad, count);
            A *to = grad_line;
            if constexpr (same)
                if (mine && features_grad)
                    to = features_grad + c * size.pixels;
            A channel_grads[3];
            gradients(
                count, f, o, ups + c * size.most, dot_grad, u_in_v, v_in_u, residual, a[c], g[c], strength[c], to, line,
                channel_grads);
            if constexpr (!same)
                if (mine && features_grad)
                    convert_row(features_grad + c * size.pixels, to, count);
            if (mine && sums.feature_gate)
                sums.feature_gate[c] += channel_grads[0];
            if (mine && sums.coarse_gate)
                sums.coarse_gate[c] += channel_grads[1];
            if (mine && sums.strength)
                sums.strength[c] += channel_grads[2];
            if (sums.coarse)
                tile.add_transposed(
                    line, flat, stretched, sums.coarse + c * sums.coarse_channel, sums.row_first, sums.row_last);
        }
    }

    // Of one channel of a tile: with u = a f and v = g up, their gradients p and q give those of f, of up, of both gates
    // and of the strength s. Differences come before products: little is left of parallel u and v, as one channel has.
    static void gradients(
        ptrdiff_t count, const A *f, const A *o, const A *up, const A *dot_grad, const A *u_in_v, const A *v_in_u,
        const A *residual, A a, A g, A s, A *features_grad, A *up_grad, A *channel_grads) {
        V feature_total{}, coarse_total{}, strength_total{};
        ptrdiff_t i = 0;
        for (; i + lanes<A> <= count; i += lanes<A>) {
            const V x = load(f + i), y = load(up + i), d = load(dot_grad + i), u = a * x, v = g * y;
            const V p = d * (v - load(u_in_v + i) * u), q = d * (u - load(v_in_u + i) * v);
            const V back = load(o + i) * load(residual + i);
            store<A>(features_grad + i, load(o + i) + s * back + a * p);
            store<A>(up_grad + i, g * q - s * back);
            feature_total += p * x;
            coarse_total += q * y;
            strength_total += back * (x - y);
        }
        A feature_rest = sum<A>(feature_total), coarse_rest = sum<A>(coarse_total);
        A strength_rest = sum<A>(strength_total);
        for (; i < count; ++i) {
            const A u = a * f[i], v = g * up[i];
            const A p = dot_grad[i] * (v - u_in_v[i] * u), q = dot_grad[i] * (u - v_in_u[i] * v);
            const A back = o[i] * residual[i];
            features_grad[i] = o[i] + s * back + a * p;
            up_grad[i] = g * q - s * back;
            feature_rest += p * f[i];
            coarse_rest += q * up[i];
            strength_rest += back * (f[i] - up[i]);
        }
        channel_grads[0] = feature_rest, channel_grads[1] = coarse_rest, channel_grads[2] = strength_rest;
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
