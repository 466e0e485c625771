// Convolutions with three taps an axis, and at the end transposed ones with two. The former by Winograd's
// F(4 x 4, 3 x 3): of the 144 multiplications that a square of 4 x 4 outputs takes a pair of channels, 36 are left.
//
// A block of tiles is transformed channel by channel (winograd.h), at each of the 36 points a matrix product takes the
// input channels to the output channels, and its results are transformed back, 32 output channels at a time. In a
// volume, the three planes that an output plane sees are so many input channels.

#include "winograd.h"

namespace {

constexpr ptrdiff_t panel = conv_panel, panels_a_group = 4;

inline Planes planes_of(const ConvForward &call) {
    return {call.batch, call.depth, call.height, call.width, call.planar};
}

template <class S> struct Block : Tiles<S> {
    using A = typename Accumulate<S>::type;
    using V = Vector<A>;
    using Tiles<S>::of, Tiles<S>::filled, Tiles<S>::gathered, Tiles<S>::segments, Tiles<S>::number_of_segments;
    const ConvForward &call;
    const ptrdiff_t inputs, point_step;
    A *transformed;  // (points, inputs, tiles), a cache line between two points
    A *products;     // (panels_a_group * panel, points, tiles)

    static ptrdiff_t inputs_of(const ConvForward &call) { return planes_of(call).taps() * call.in_channels; }
    // Without the line between them all points of many channels would share the same few sets of the cache.
    static ptrdiff_t step_of(const ConvForward &call) { return inputs_of(call) * tiles + 64 / ptrdiff_t(sizeof(A)); }
    // Of working memory: for a block, which threads may share, and what a thread has to itself.
    static ptrdiff_t shared_numbers(const ConvForward &call) { return points * step_of(call); }
    static ptrdiff_t own_numbers() { return panels_a_group * panel * points * tiles + Tiles<S>::numbers; }

    Block(const ConvForward &given, A *own)
        : Tiles<S>(planes_of(given), own + panels_a_group * panel * points * tiles), call(given),
          inputs(inputs_of(given)), point_step(step_of(given)), transformed(nullptr), products(own) {}

    // A panel of output channels at one point: as much of the result as registers hold at a time.
    void multiply_panel(const A *__restrict weight, const A *__restrict right, A *__restrict to) const {
        constexpr ptrdiff_t n = lanes<A>;
        ptrdiff_t column = 0;
        for (; column + product_vectors * n <= filled; column += product_vectors * n)
            multiply_columns_of<product_vectors>(weight, right + column, to + column);
        if (column + 2 * n == filled)
            multiply_columns_of<2>(weight, right + column, to + column);
        else if (column + n == filled)
            multiply_columns_of<1>(weight, right + column, to + column);
    }

    template <int vectors>
    void multiply_columns_of(const A *__restrict weight, const A *__restrict right, A *__restrict to) const {
        constexpr int rows = product_rows;
        for (ptrdiff_t r = 0; r < panel; r += rows) {
            V total[rows][vectors] = {};
            const A *a = weight + r, *b = right;
            for (ptrdiff_t k = 0; k < inputs; ++k, a += panel, b += tiles) {
                V wide[vectors];
#pragma GCC unroll 3
                for (int j = 0; j < vectors; ++j)
                    wide[j] = load(b + j * lanes<A>);
#pragma GCC unroll 8
                for (int i = 0; i < rows; ++i) {
                    const V left = broadcast(a[i]);
#pragma GCC unroll 3
                    for (int j = 0; j < vectors; ++j)
                        total[i][j] += left * wide[j];
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
                for (int j = 0; j < vectors; ++j)
                    store(to + (r + i) * points * tiles + j * lanes<A>, total[i][j]);
        }
    }

    static inline void restore_line(V *__restrict y, V m0, V m1, V m2, V m3, V m4, V m5) {
        const V even_p = m1 + m2, odd_p = m1 - m2, even_q = m3 + m4, odd_q = m3 - m4;
        y[0] = m0 + even_p + even_q;
        y[1] = A(p) * odd_p + A(q) * odd_q;
        y[2] = A(p * p) * even_p + A(q * q) * even_q;
        y[3] = A(p * p * p) * odd_p + A(q * q * q) * odd_q + m5;
    }

    // The 4 x 4 outputs of each tile, position by position, into `gathered`.
    void restore(const A *product, A bias) {
        for (ptrdiff_t n = 0; n < filled; n += lanes<A>) {
            V lines[6][4];
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) {
                const A *m = product + j * tiles + n;
                restore_line(
                    lines[j], load(m), load(m + 6 * tiles), load(m + 12 * tiles), load(m + 18 * tiles),
                    load(m + 24 * tiles), load(m + 30 * tiles));
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                V row[4];
                restore_line(row, lines[0][i], lines[1][i], lines[2][i], lines[3][i], lines[4][i], lines[5][i]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    store(gathered + (4 * i + j) * position_step + n, row[j] + bias);
            }
        }
    }

#ifdef __AVX512F__
    static inline void store_up_to(float *to, __m512 value, ptrdiff_t count) {
        _mm512_mask_storeu_ps(to, Tiles<S>::mask_of(count), value);
    }
    // Rounded as narrow() does.
    static inline void store_up_to(bfloat16 *to, __m512 value, ptrdiff_t count) {
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(tie, _mm512_set1_epi32(0x7fff)));
        rounded = _mm512_mask_mov_epi32(
            rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
        _mm256_mask_storeu_epi16(to, Tiles<S>::mask_of(count), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
#endif

    // `length` numbers of a row of the image from the tiles' four columns.
    static void join(S *__restrict to, const A *__restrict from, ptrdiff_t length) {
#ifdef __AVX512F__
        if constexpr (std::is_same_v<A, float>) {
            const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            for (; length > 0; from += 16, to += 64, length -= 64) {
                const __m512 a = (__m512)load(from), b = (__m512)load(from + position_step);
                const __m512 c = (__m512)load(from + 2 * position_step), d = (__m512)load(from + 3 * position_step);
                // Columns 0 and 2 of the tiles in turns, and 1 and 3; then those of both.
                const __m512 even[2] = {_mm512_permutex2var_ps(a, low, c), _mm512_permutex2var_ps(a, high, c)};
                const __m512 odd[2] = {_mm512_permutex2var_ps(b, low, d), _mm512_permutex2var_ps(b, high, d)};
#pragma GCC unroll 2
                for (int k = 0; k < 2; ++k) {
                    store_up_to(to + 32 * k, _mm512_permutex2var_ps(even[k], low, odd[k]), length - 32 * k);
                    store_up_to(to + 32 * k + 16, _mm512_permutex2var_ps(even[k], high, odd[k]), length - 32 * k - 16);
                }
            }
            return;
        }
#endif
        const ptrdiff_t whole = length / 4;
        for (ptrdiff_t t = 0; t < whole; ++t)
            for (ptrdiff_t j = 0; j < 4; ++j)
                convert(to[4 * t + j], from[t + j * position_step]);
        for (ptrdiff_t k = 4 * whole; k < length; ++k)
            convert(to[k], from[whole + k % 4 * position_step]);
    }

    void scatter(ptrdiff_t channel) {
        for (int s = 0; s < number_of_segments; ++s) {
            const Segment &part = segments[s];
            const ptrdiff_t image = part.plane / call.depth, z = part.plane % call.depth, left = 4 * part.column;
            const ptrdiff_t length = 4 * part.count < call.width - left ? 4 * part.count : call.width - left;
            S *plane = static_cast<S *>(call.out) +
                       ((image * call.out_channels + channel) * call.depth + z) * call.height * call.width;
            for (ptrdiff_t i = 0; i < 4 && 4 * part.row + i < call.height; ++i) {
                S *row = plane + (4 * part.row + i) * call.width + left;
                Tiles<S>::template prefetch<1>(row + call.depth * call.height * call.width, length);
                join(row, gathered + 4 * i * position_step + part.first, length);
            }
        }
    }

    // An input channel of the tiles, up to its matrix products.
    void read(ptrdiff_t input) {
        const ptrdiff_t tap = input / call.in_channels, channel = input % call.in_channels, first = call.first_channels;
        const ptrdiff_t shift = tap - of.taps() / 2;
        if (channel < first)
            this->gather(static_cast<const S *>(call.x), first, channel, shift);
        else
            this->gather(static_cast<const S *>(call.more), call.in_channels - first, channel - first, shift);
        this->transform(transformed + input * tiles, point_step);
    }

    // The output channels of some panels, from the transformed inputs.
    void write(ptrdiff_t begin, ptrdiff_t end) {
        const A *weight = static_cast<const A *>(call.weight), *bias = static_cast<const A *>(call.bias);
        const ptrdiff_t panels = conv_panels(call.out_channels);
        for (ptrdiff_t point = 0; point < points; ++point)
            for (ptrdiff_t one = begin; one < end; ++one)
                multiply_panel(
                    weight + (point * panels + one) * inputs * panel, transformed + point * point_step,
                    products + ((one - begin) * panel * points + point) * tiles);
        for (ptrdiff_t channel = begin * panel; channel < end * panel && channel < call.out_channels; ++channel) {
            restore(products + (channel - begin * panel) * points * tiles, bias[channel]);
            scatter(channel);
        }
    }
};

template <class S> void convolve(const ConvForward &call) {
    using A = typename Accumulate<S>::type;
    const ptrdiff_t blocks = planes_of(call).blocks(), panels = conv_panels(call.out_channels);
    const int threads = call.threads;
    if (!blocks || !panels)
        return;
    // In rounds every thread has a block of its own. What is left, of a small image all there is, is shared: first its
    // input channels, then its output channels. A tenth of the threads without a block cost less than to wait for others.
    const ptrdiff_t left = blocks % threads, shared = left * 10 < threads * 9 ? left : 0, own = blocks - shared;
    const ptrdiff_t each = (panels * shared + threads - 1) / threads;
    const ptrdiff_t step = shared && each < panels_a_group ? each : panels_a_group;
    const ptrdiff_t groups = (panels + panels_a_group - 1) / panels_a_group, parts = (panels + step - 1) / step;
    const Scratch<A> transformed(Block<S>::shared_numbers(call), own ? threads : int(shared));
    const Scratch<A> others(Block<S>::own_numbers(), threads);
    in_parallel(threads, [&](const Team &team) {
        Block<S> at(call, others.of(team.number));
        const auto write = [&](ptrdiff_t begin, ptrdiff_t count) {
            at.write(begin, begin + count < panels ? begin + count : panels);
        };
        if (own) {
            at.transformed = transformed.of(team.number);
            team.share(own, [&](ptrdiff_t block) {
                at.place(block);
                for (ptrdiff_t input = 0; input < at.inputs; ++input)
                    at.read(input);
                for (ptrdiff_t group = 0; group < groups; ++group)
                    write(group * panels_a_group, panels_a_group);
            });
        }
        ptrdiff_t last = -1;
        const auto move = [&](ptrdiff_t number) {
            if (number == last)
                return;
            last = number;
            at.transformed = transformed.all + number * transformed.each;
            at.place(own + number);
        };
        if (shared) {
            team.meet();
            team.share(shared * at.inputs, [&](ptrdiff_t one) {
                move(one / at.inputs);
                at.read(one % at.inputs);
            });
            team.meet();
            // The blocks one after another by the same weights.
            team.share(shared * parts, [&](ptrdiff_t one) {
                move(one % shared);
                write(one / shared * step, step);
            });
        }
    });
}

// A transposed convolution whose taps do not overlap: a matrix product, and its rows woven together. A strip is part of a
// row of a plane, or some whole rows, for all channels.
template <class S> void upsample(const ConvForward &call) {
    using A = typename Accumulate<S>::type;
    constexpr ptrdiff_t most = 48;
    const ptrdiff_t height = call.height, width = call.width, inputs = call.in_channels, outputs = call.out_channels;
    if (!height || !width)
        return;
    const ptrdiff_t across = (width + most - 1) / most, rows = across > 1 ? 1 : most / width;
    const ptrdiff_t down = (height + rows - 1) / rows, pixels = call.depth * height * width;
    const ptrdiff_t taps = call.planar ? 4 : 8, deep = call.planar ? 1 : 2;
    const Scratch<A> scratch((inputs + 2 * outputs + 2) * most, call.threads);
    const A *weight = static_cast<const A *>(call.weight), *bias = static_cast<const A *>(call.bias);
    each(call.threads, call.batch * call.depth * down * across, [=, &scratch](ptrdiff_t unit, int thread) {
        const ptrdiff_t plane = unit / across / down, image = plane / call.depth, z = plane % call.depth;
        const ptrdiff_t y = unit / across % down * rows, left = unit % across * most;
        const ptrdiff_t length = width - left < most ? width - left : most, high = height - y < rows ? height - y : rows;
        const ptrdiff_t count = high * length, wide = padded(count);
        A *pixel = scratch.of(thread), *product = pixel + inputs * most, *woven = product + 2 * outputs * most;
        const S *from = static_cast<const S *>(call.x) + image * inputs * pixels + (z * height + y) * width + left;
        for (ptrdiff_t c = 0; c < inputs; ++c) {
            convert_row(pixel + c * wide, from + c * pixels, count);
            for (ptrdiff_t k = count; k < wide; ++k)
                pixel[c * wide + k] = 0;
        }
        // Two taps that lie side by side in a row of the result at a time.
        for (ptrdiff_t tap = 0; tap < taps; tap += 2) {
            multiply<A, Start::zero>(
                2 * outputs, wide, inputs,
                {weight + tap * outputs * inputs, inputs, 1, pixel, wide, product, wide, nullptr, 0});
            const ptrdiff_t line = (deep * z + tap / 4) * 2 * height + 2 * y + tap / 2 % 2;
            for (ptrdiff_t c = 0; c < outputs; ++c) {
                S *to = static_cast<S *>(call.out) + (image * outputs + c) * pixels * taps + line * 2 * width + 2 * left;
                const A add = bias[c];
                for (ptrdiff_t r = 0; r < high; ++r) {
                    const A *even = product + c * wide + r * length, *odd = even + outputs * wide;
GRCSF_INDEPENDENT
                    for (ptrdiff_t k = 0; k < length; ++k) {
                        woven[2 * k] = even[k] + add;
                        woven[2 * k + 1] = odd[k] + add;
                    }
                    convert_row(to + 4 * r * width, woven, 2 * length);
                }
            }
        }
    });
}

}  // namespace

namespace grcsf {
namespace GRCSF_ISA {
void (*const upsample_forward[dtypes])(const ConvForward &) = {upsample<float>, upsample<bfloat16>, upsample<double>};
void (*const conv_forward[dtypes])(const ConvForward &) = {convolve<float>, convolve<bfloat16>, convolve<double>};
}  // namespace GRCSF_ISA
}  // namespace grcsf
