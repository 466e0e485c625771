// What convolutions by Winograd's F(4 x 4, 3 x 3) and the gradients of their weights have in common: tiles of pixels, taken
// from an image and brought to the points where products are made.
// Lavin and Gray, "Fast algorithms for convolutional neural networks", arXiv:1509.09308.
//
// A tile is a square of 4 x 4 outputs, which sees 6 x 6 inputs. 48 tiles, in the order of the image's rows and over all
// planes of the batch, make a block.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace grcsf;

// The polynomials are known at 0, p, -p, q, -q and infinity. 1 and 2 are usual for p and q; these are nearer to each other
// and about each other's inverse, which keeps the transforms' numbers, and so the errors, smaller. The weights must have
// been transformed alike.
constexpr double p = conv_near_point, q = conv_far_point;
constexpr ptrdiff_t points = 36, tiles = 48;
// Between two positions of the gathered tiles: a vector that begins at the last tile has room.
constexpr ptrdiff_t position_step = tiles + 16;

// Planes (images, depth, height, width), of which an output plane sees three along depth, or one where `planar`.
struct Planes {
    ptrdiff_t batch, depth, height, width;
    bool planar;
    ptrdiff_t taps() const { return planar ? 1 : 3; }
    ptrdiff_t across() const { return (width + 3) / 4; }
    ptrdiff_t down() const { return (height + 3) / 4; }
    ptrdiff_t blocks() const { return (batch * depth * down() * across() + tiles - 1) / tiles; }
};

// Rows and vectors of a product that stay in registers: three vectors, but two of NEON, where compilers keep some of three in
// memory.
constexpr int product_rows = block_rows, product_vectors = vector_bytes == 16 && block_rows == 8 ? 2 : 3;

// A row of tiles, or the part of it that lies in a block.
struct Segment {
    ptrdiff_t plane, row, column, count, first;  // `first` is its place in the block
};

// A block, one channel at a time.
template <class S> struct Tiles {
    using A = typename Accumulate<S>::type;
    using V = Vector<A>;
    const Planes of;
    A *gathered;  // (6, 6, position_step)
    Segment segments[tiles];
    int number_of_segments;
    ptrdiff_t filled;  // tiles in whole vectors
    bool whole;

    static constexpr ptrdiff_t positions = 6 * 6, numbers = positions * position_step;  // numbers: of `gathered`

    // How many of a block's tiles there are.
    static ptrdiff_t count_of(const Planes &of, ptrdiff_t block) {
        const ptrdiff_t left = of.batch * of.depth * of.down() * of.across() - block * tiles;
        return left < tiles ? left : tiles;
    }
    static ptrdiff_t whole_vectors(ptrdiff_t count) { return (count + lanes<A> - 1) / lanes<A> * lanes<A>; }

    Tiles(const Planes &planes, A *memory)
        : of(planes), gathered(memory), number_of_segments(0), filled(0), whole(false) {}

    void place(ptrdiff_t block) {
        const ptrdiff_t count = count_of(of, block);
        whole = count == tiles;
        number_of_segments = 0;
        filled = whole_vectors(count);
        for (ptrdiff_t done = 0; done < count;) {
            const ptrdiff_t tile = block * tiles + done, row = tile / of.across(), column = tile % of.across();
            const ptrdiff_t rest = count - done, length = of.across() - column < rest ? of.across() - column : rest;
            segments[number_of_segments++] = {row / of.down(), row % of.down(), column, length, done};
            done += length;
        }
    }

    // The 6 x 6 inputs of each tile, position by position, 0 outside the image; their rows from `first_row` on, before
    // `end_row`. Each output plane sees that of x which lies `shift` farther.
    void gather(
        const S *x, ptrdiff_t channels, ptrdiff_t channel, ptrdiff_t shift, int first_row = 0, int end_row = 6) {
        // Tiles that a last block lacks are computed all the same. Their outputs are dropped, and the gradients of their
        // outputs are 0, whatever the inputs are.
        if (!whole)
            std::memset(gathered, 0, numbers * sizeof(A));
        const ptrdiff_t next = of.depth * of.height * of.width;
        for (int s = 0; s < number_of_segments; ++s) {
            const Segment &part = segments[s];
            const ptrdiff_t image = part.plane / of.depth, z = part.plane % of.depth + shift;
            const S *plane = x + ((image * channels + channel) * of.depth + z) * of.height * of.width;
            for (ptrdiff_t i = first_row; i < end_row; ++i) {
                A *line = gathered + 6 * i * position_step + part.first;
                const ptrdiff_t y = 4 * part.row - 1 + i, left = 4 * part.column;
                if (z < 0 || z >= of.depth || y < 0 || y >= of.height)
                    for (ptrdiff_t j = 0; j < 6; ++j)
                        std::memset(line + j * position_step, 0, size_t(part.count) * sizeof(A));
                else {
                    const S *row = plane + y * of.width + left;
                    // Planes lie too far apart for the processor to guess what comes next.
                    prefetch<0>(row + next, 4 * part.count);
                    split(line, row, part.count, left > 0, of.width - left);
                }
            }
        }
    }

    template <int write> static void prefetch(const S *from, ptrdiff_t count) {
        for (ptrdiff_t k = 0; k < count; k += 64 / ptrdiff_t(sizeof(S)))
            __builtin_prefetch(from + k, write);
    }

    // The tiles' six columns from a row: the four between `from` and those of the next tile, the one before, and the one
    // behind. `rest` numbers are left in the row.
    static void split(A *__restrict to, const S *__restrict from, ptrdiff_t count, bool before, ptrdiff_t rest) {
#ifdef __AVX512F__
        if constexpr (std::is_same_v<A, float>) {
            const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 2, 6, 10, 14, 18, 22, 26, 30);
            const __m512i odd = _mm512_setr_epi32(1, 5, 9, 13, 17, 21, 25, 29, 3, 7, 11, 15, 19, 23, 27, 31);
            __m512 last = _mm512_set1_ps(before ? widen(from[-1]) : 0.0f);
            for (ptrdiff_t t = 0; t < count; t += 16, from += 64, rest -= 64) {
                const __m512 a = load_up_to(from, rest), b = load_up_to(from + 16, rest - 16);
                const __m512 c = load_up_to(from + 32, rest - 32), d = load_up_to(from + 48, rest - 48);
                const __m512 even_low = _mm512_permutex2var_ps(a, even, b), odd_low = _mm512_permutex2var_ps(a, odd, b);
                const __m512 even_high = _mm512_permutex2var_ps(c, even, d), odd_high = _mm512_permutex2var_ps(c, odd, d);
                const __m512 first = _mm512_shuffle_f32x4(even_low, even_high, 0x44);
                const __m512 fourth = _mm512_shuffle_f32x4(odd_low, odd_high, 0xEE);
                const __m512 next = load_up_to(from + 64, rest > 64 ? 1 : 0);
                store(to + t, (V)shift<15>(last, fourth));
                store(to + t + position_step, (V)first);
                store(to + t + 2 * position_step, (V)_mm512_shuffle_f32x4(odd_low, odd_high, 0x44));
                store(to + t + 3 * position_step, (V)_mm512_shuffle_f32x4(even_low, even_high, 0xEE));
                store(to + t + 4 * position_step, (V)fourth);
                store(to + t + 5 * position_step, (V)shift<1>(first, next));
                last = fourth;
            }
            return;
        }
#endif
        const ptrdiff_t whole = rest / 4 < count ? rest / 4 : count;
        to[0] = before ? widen(from[-1]) : A(0);
        for (ptrdiff_t j = 0; j < 4; ++j)
            for (ptrdiff_t t = 0; t < whole; ++t)
                to[t + (j + 1) * position_step] = widen(from[4 * t + j]);
        if (whole < count)
            for (ptrdiff_t j = 0; j < 4; ++j)
                to[whole + (j + 1) * position_step] = 4 * whole + j < rest ? widen(from[4 * whole + j]) : A(0);
        for (ptrdiff_t t = 1; t < count; ++t) {
            to[t] = to[t - 1 + 4 * position_step];
            to[t - 1 + 5 * position_step] = to[t + position_step];
        }
        to[count - 1 + 5 * position_step] = rest > 4 * count ? widen(from[4 * count]) : A(0);
    }

#ifdef __AVX512F__
    // The first `count` numbers, and 0 beyond.
    static inline __m512 load_up_to(const float *from, ptrdiff_t count) {
        return _mm512_maskz_loadu_ps(mask_of(count), from);
    }
    static inline __m512 load_up_to(const bfloat16 *from, ptrdiff_t count) {
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask_of(count), from)), 16));
    }
    static inline __mmask16 mask_of(ptrdiff_t count) {
        return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
    }
    // Numbers from `places` on of two vectors in a row.
    template <int places> static inline __m512 shift(__m512 low, __m512 high) {
        return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(high), _mm512_castps_si512(low), places));
    }
#endif

    static inline void transform_line(V *__restrict t, V d0, V d1, V d2, V d3, V d4, V d5) {
        constexpr A p2 = A(p * p), q2 = A(q * q), product = A(p * p * q * q), sum = A(p * p + q * q);
        const V even_p = d4 - q2 * d2, odd_p = d3 - q2 * d1, even_q = d4 - p2 * d2, odd_q = d3 - p2 * d1;
        t[0] = product * d0 - sum * d2 + d4;
        t[1] = even_p + A(p) * odd_p;
        t[2] = even_p - A(p) * odd_p;
        t[3] = even_q + A(q) * odd_q;
        t[4] = even_q - A(q) * odd_q;
        t[5] = product * d1 - sum * d3 + d5;
    }

    // Of the 6 x 6 inputs, (points, tiles) that lie `point_step` apart.
    void transform(A *to, ptrdiff_t point_step) const {
        for (ptrdiff_t n = 0; n < filled; n += lanes<A>) {
            V lines[6][6];
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i) {
                const A *d = gathered + 6 * i * position_step + n;
                transform_line(
                    lines[i], load(d), load(d + position_step), load(d + 2 * position_step),
                    load(d + 3 * position_step), load(d + 4 * position_step), load(d + 5 * position_step));
            }
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) {
                V column[6];
                transform_line(
                    column, lines[0][j], lines[1][j], lines[2][j], lines[3][j], lines[4][j], lines[5][j]);
#pragma GCC unroll 6
                for (int i = 0; i < 6; ++i)
                    store(to + (6 * i + j) * point_step + n, column[i]);
            }
        }
    }
};

}  // namespace
