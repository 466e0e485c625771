// The gradient of the weight of a convolution with three taps an axis, by the transforms of conv.cpp the other way round:
// the inputs are brought to the 36 points as there, the outputs' gradients by the transpose of what restores outputs, their
// products are summed over all tiles, and the sums are brought to the 3 x 3 taps by the transpose of filters.cpp. Of the 144
// multiplications a tile and pair of channels 36 are left.
//
// Some blocks of tiles make a round. The threads share its channels, to transform them, and then its points and strips of
// output channels, to multiply. The sums of a block begin at 0 and are then added, block after block, by one thread each:
// neither threads nor rounds change them.

#include "winograd.h"

namespace {

// Channels whose transforms one thread makes at a time, side by side in whole cache lines.
constexpr ptrdiff_t group = 16;
constexpr int rows = product_rows, vectors = product_vectors;
// Channels of out_grad that a thread multiplies at a point, at most.
constexpr ptrdiff_t widest = 32;
// Of a round's transforms, for each thread: what a usual second cache holds beside other things.
constexpr ptrdiff_t bytes_a_thread = 1 << 19;

// to += A B, or = where `begins`; A (count, depth), whose rows are `tiles` apart, B (depth, width vectors), to (count, width
// vectors).
template <class A, int width>
void multiply_vectors(
    ptrdiff_t count, ptrdiff_t depth, const A *__restrict a, const A *__restrict b, ptrdiff_t b_row, A *__restrict to,
    ptrdiff_t to_row, bool begins) {
    for (ptrdiff_t r = 0; r < count; r += rows) {
        Vector<A> total[rows][width] = {};
        const A *left = a + r * tiles, *right = b;
        for (ptrdiff_t k = 0; k < depth; ++k, ++left, right += b_row) {
            Vector<A> wide[width];
#pragma GCC unroll 3
            for (int j = 0; j < width; ++j)
                wide[j] = load(right + j * lanes<A>);
#pragma GCC unroll 8
            for (int i = 0; i < rows; ++i) {
                const Vector<A> one = broadcast(left[i * tiles]);
#pragma GCC unroll 3
                for (int j = 0; j < width; ++j)
                    total[i][j] += one * wide[j];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < width; ++j) {
                A *place = to + (r + i) * to_row + j * lanes<A>;
                store(place, begins ? total[i][j] : load(place) + total[i][j]);
            }
    }
}

// As many as keep no thread much longer at work than the others.
inline ptrdiff_t strip_of(ptrdiff_t outputs, int threads) {
    const auto longest = [=](ptrdiff_t strip) {
        const ptrdiff_t parts = points * ((outputs + strip - 1) / strip);
        return (parts + threads - 1) / threads * (strip < outputs ? strip : outputs);
    };
    ptrdiff_t best = widest;
    for (ptrdiff_t strip = widest / 2; strip >= rows; strip /= 2)
        if (longest(strip) * 10 < longest(best) * 9)
            best = strip;
    return best;
}

template <class S> struct Gradient {
    using A = typename Accumulate<S>::type;
    using V = Vector<A>;
    const ConvWeightGrad &call;
    const Planes of;
    const ptrdiff_t inputs, outputs, columns, row_step;  // the first two without, the others with what fills up vectors
    const ptrdiff_t strip, x_point, grad_point, x_block, grad_block;
    A *x;         // (blocks of a round, points, tiles, row_step), of which `columns` are used
    A *out_grad;  // (blocks of a round, points, outputs in strips, tiles), a cache line between two points
    A *products;  // (points, outputs in strips, columns)

    explicit Gradient(const ConvWeightGrad &given)
        : call(given), of{given.batch, given.depth, given.height, given.width, given.planar},
          inputs(of.taps() * given.in_channels), outputs((given.out_channels + rows - 1) / rows * rows),
          columns(padded(inputs)), row_step(columns + 64 / ptrdiff_t(sizeof(A))), strip(strip_of(outputs, given.threads)),
          x_point(tiles * row_step),
          grad_point(outputs * tiles + 64 / ptrdiff_t(sizeof(A))), x_block(points * x_point),
          grad_block(points * grad_point), x(nullptr), out_grad(nullptr), products(nullptr) {}

    // A group of inputs: transformed, then with the channels of a tile side by side.
    void read_inputs(Tiles<S> &at, ptrdiff_t first, A *to, A *own) const {
        for (ptrdiff_t k = 0; k < group; ++k) {
            A *mine = own + k * tiles;
            const ptrdiff_t input = first + k, tap = input / call.in_channels;
            if (input < inputs) {
                at.gather(
                    static_cast<const S *>(call.x), call.in_channels, input % call.in_channels, tap - of.taps() / 2);
                at.transform(mine, group * tiles);
            } else
                for (ptrdiff_t point = 0; point < points; ++point)
                    std::memset(mine + point * group * tiles, 0, tiles * sizeof(A));
        }
        for (ptrdiff_t point = 0; point < points; ++point)
            transpose(
                to + point * x_point + first, row_step, own + point * group * tiles, tiles, group, at.filled);
    }

    // What each point of a line gets from four numbers.
    static inline void spread_line(V *__restrict m, V y0, V y1, V y2, V y3) {
        const V even_p = y0 + A(p * p) * y2, odd_p = A(p) * y1 + A(p * p * p) * y3;
        const V even_q = y0 + A(q * q) * y2, odd_q = A(q) * y1 + A(q * q * q) * y3;
        m[0] = y0;
        m[1] = even_p + odd_p;
        m[2] = even_p - odd_p;
        m[3] = even_q + odd_q;
        m[4] = even_q - odd_q;
        m[5] = y3;
    }

    void read_gradients(Tiles<S> &at, ptrdiff_t first, A *to) const {
        for (ptrdiff_t channel = first; channel < first + group && channel < outputs; ++channel) {
            A *mine = to + channel * tiles;
            if (channel >= call.out_channels) {
                for (ptrdiff_t point = 0; point < points; ++point)
                    std::memset(mine + point * grad_point, 0, tiles * sizeof(A));
                continue;
            }
            // The 4 x 4 in the middle of the 6 x 6 that the inputs have.
            at.gather(static_cast<const S *>(call.out_grad), call.out_channels, channel, 0, 1, 5);
            for (ptrdiff_t n = 0; n < at.filled; n += lanes<A>) {
                V lines[4][6];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const A *d = at.gathered + (6 * (i + 1) + 1) * position_step + n;
                    spread_line(
                        lines[i], load(d), load(d + position_step), load(d + 2 * position_step),
                        load(d + 3 * position_step));
                }
#pragma GCC unroll 6
                for (int j = 0; j < 6; ++j) {
                    V column[6];
                    spread_line(column, lines[0][j], lines[1][j], lines[2][j], lines[3][j]);
#pragma GCC unroll 6
                    for (int i = 0; i < 6; ++i)
                        store(mine + (6 * i + j) * grad_point + n, column[i]);
                }
            }
        }
    }

    void multiply(ptrdiff_t point, ptrdiff_t first_row, ptrdiff_t block, ptrdiff_t depth, bool begins) const {
        const ptrdiff_t count = outputs - first_row < strip ? outputs - first_row : strip;
        const A *a = out_grad + block * grad_block + point * grad_point + first_row * tiles;
        const A *b = x + block * x_block + point * x_point;
        A *to = products + (point * outputs + first_row) * columns;
        ptrdiff_t n = 0;
        for (; n + vectors * lanes<A> <= columns; n += vectors * lanes<A>)
            multiply_vectors<A, vectors>(count, depth, a, b + n, row_step, to + n, columns, begins);
        if (n + 2 * lanes<A> == columns)
            multiply_vectors<A, 2>(count, depth, a, b + n, row_step, to + n, columns, begins);
        else if (n + lanes<A> == columns)
            multiply_vectors<A, 1>(count, depth, a, b + n, row_step, to + n, columns, begins);
    }

    // What three taps get from the points of a line.
    static inline void restore_line(V *__restrict taps, V m0, V m1, V m2, V m3, V m4, V m5) {
        constexpr A zero = A(conv_at_zero), near = A(conv_at_near), far = A(conv_at_far);
        const V even_p = near * (m1 + m2), odd_p = near * (m1 - m2);
        const V even_q = far * (m3 + m4), odd_q = far * (m3 - m4);
        taps[0] = zero * m0 + even_p + even_q;
        taps[1] = A(p) * odd_p + A(q) * odd_q;
        taps[2] = A(p * p) * even_p + A(q * q) * even_q + m5;
    }

    void write(ptrdiff_t channel) const {
        const ptrdiff_t step = outputs * columns;
        for (ptrdiff_t n = 0; n < columns; n += lanes<A>) {
            const A *from = products + channel * columns + n;
            V lines[6][3];
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i, from += 6 * step)
                restore_line(
                    lines[i], load(from), load(from + step), load(from + 2 * step), load(from + 3 * step),
                    load(from + 4 * step), load(from + 5 * step));
            A weights[9][lanes<A>];
            for (int j = 0; j < 3; ++j) {
                V taps[3];
                restore_line(taps, lines[0][j], lines[1][j], lines[2][j], lines[3][j], lines[4][j], lines[5][j]);
                for (int i = 0; i < 3; ++i)
                    store(weights[3 * i + j], taps[i]);
            }
            for (ptrdiff_t k = 0; k < lanes<A> && n + k < inputs; ++k) {
                const ptrdiff_t plane = (n + k) / call.in_channels, input = (n + k) % call.in_channels;
                A *to = static_cast<A *>(call.weight_grad) +
                        ((channel * call.in_channels + input) * of.taps() + plane) * 9;
                for (int tap = 0; tap < 9; ++tap)
                    to[tap] = weights[tap][k];
            }
        }
    }
};

template <class S> void weight_gradient(const ConvWeightGrad &call) {
    using A = typename Accumulate<S>::type;
    Gradient<S> all(call);
    const ptrdiff_t blocks = all.of.blocks();
    if (!blocks) {
        std::memset(call.weight_grad, 0, size_t(call.out_channels * all.inputs * 9) * sizeof(A));
        return;
    }
    const ptrdiff_t fitting = call.threads * bytes_a_thread / ((all.x_block + all.grad_block) * ptrdiff_t(sizeof(A)));
    const ptrdiff_t most = fitting < 1 ? 1 : fitting < blocks ? fitting : blocks;
    const ptrdiff_t input_groups = (all.inputs + group - 1) / group, groups = input_groups + (all.outputs + group - 1) / group;
    const ptrdiff_t strips = (all.outputs + all.strip - 1) / all.strip;
    const Scratch<A> shared(most * (all.x_block + all.grad_block) + points * all.outputs * all.columns, 1);
    const Scratch<A> own(Tiles<S>::numbers + points * group * tiles, call.threads);
    all.x = shared.all, all.out_grad = all.x + most * all.x_block, all.products = all.out_grad + most * all.grad_block;
    in_parallel(call.threads, [&](const Team &team) {
        A *mine = own.of(team.number);
        Tiles<S> at(all.of, mine);
        for (ptrdiff_t round = 0; round < blocks; round += most) {
            const ptrdiff_t here = blocks - round < most ? blocks - round : most;
            team.share(here * groups, [&](ptrdiff_t unit) {
                const ptrdiff_t block = unit / groups, one = unit % groups;
                at.place(round + block);
                if (one < input_groups)
                    all.read_inputs(at, one * group, all.x + block * all.x_block, mine + Tiles<S>::numbers);
                else
                    all.read_gradients(at, (one - input_groups) * group, all.out_grad + block * all.grad_block);
            });
            team.meet();
            team.share(points * strips, [&](ptrdiff_t unit) {
                for (ptrdiff_t block = 0; block < here; ++block) {
                    const ptrdiff_t filled = Tiles<S>::whole_vectors(Tiles<S>::count_of(all.of, round + block));
                    all.multiply(unit / strips, unit % strips * all.strip, block, filled, round + block == 0);
                }
            });
            team.meet();
        }
        team.share(call.out_channels, [&](ptrdiff_t channel) { all.write(channel); });
    });
}

}  // namespace

namespace grcsf {
namespace GRCSF_ISA {
void (*const conv_weight_grad[dtypes])(const ConvWeightGrad &) = {
    weight_gradient<float>, weight_gradient<bfloat16>, weight_gradient<double>};
}  // namespace GRCSF_ISA
}  // namespace grcsf
