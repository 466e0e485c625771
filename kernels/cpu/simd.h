// Vectors of one instruction set, and what the kernels build on: conversions, exp, a small matrix product.
//
// Each of them is compiled once for each instruction set, with GRCSF_ISA naming the namespace, so nothing here may have
// external linkage: two copies of an inline function would be merged, and the wrong one could win.
#pragma once

#include "kernels.h"
#include "parallel.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <limits>
#include <new>
#include <type_traits>

#ifdef GRCSF_X86
#include <immintrin.h>
#endif

// Before a loop: no round reads what another one writes.
#ifdef __clang__
#define GRCSF_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GRCSF_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

struct bfloat16 {
    uint16_t bits;
};

// Numbers are stored as S and computed in A.
template <class S> struct Accumulate {
    using type = S;
};
template <> struct Accumulate<bfloat16> {
    using type = float;
};

template <class A> struct VectorOf;
template <> struct VectorOf<float> {
    typedef float type __attribute__((vector_size(vector_bytes)));
    typedef float unaligned __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
    typedef int32_t integer __attribute__((vector_size(vector_bytes)));
    typedef uint32_t bits __attribute__((vector_size(vector_bytes)));
};
template <> struct VectorOf<double> {
    typedef double type __attribute__((vector_size(vector_bytes)));
    typedef double unaligned __attribute__((vector_size(vector_bytes), aligned(8), may_alias));
};
template <class A> using Vector = typename VectorOf<A>::type;
template <class A> constexpr int lanes = vector_bytes / int(sizeof(A));

template <class A> inline Vector<A> load(const A *from) {
    return *reinterpret_cast<const typename VectorOf<A>::unaligned *>(from);
}
template <class A> inline void store(A *to, Vector<A> value) {
    *reinterpret_cast<typename VectorOf<A>::unaligned *>(to) = value;
}
template <class A> inline Vector<A> broadcast(A value) { return value - Vector<A>{}; }

template <class A> inline A sum(Vector<A> value) {
    A parts[lanes<A>];
    store(parts, value);
    for (int step = lanes<A> / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i)
            parts[i] += parts[i + step];
    return parts[0];
}

inline float widen(bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

template <class S> inline S narrow(typename Accumulate<S>::type value) { return value; }
// Round to nearest, ties to even; NaN stays NaN.
template <> inline bfloat16 narrow<bfloat16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {uint16_t(value != value ? 0x7fc0u : rounded)};
}

// Conversion and copying of rows; a count that is an integral_constant is known when compiling.
template <class To, class From> inline void convert(To &to, From from) {
    to = narrow<To>(typename Accumulate<To>::type(widen(from)));
}
template <class To, class From, class Count> inline void convert_row(To *to, const From *from, Count count) {
    if constexpr (std::is_integral_v<Count>) {
GRCSF_INDEPENDENT
        for (ptrdiff_t i = 0; i < count; ++i)
            convert(to[i], from[i]);
    } else {
        for (ptrdiff_t i = 0; i < Count::value; ++i)
            convert(to[i], from[i]);
    }
}

// A row of storage as a row to compute with; `buffer` is filled only where the two differ.
template <class S, class A> inline const A *wide_row(const S *from, A *buffer, ptrdiff_t count) {
    if constexpr (std::is_same_v<S, A>) {
        return from;
    } else {
        convert_row(buffer, from, count);
        return buffer;
    }
}

// Copies past the caches: a store that misses would first read the line that it is about to overwrite. stream_done()
// makes the stores visible to other threads.
inline void stream(void *to, const void *from, ptrdiff_t bytes) {
#ifdef GRCSF_X86
    char *target = static_cast<char *>(to);
    const char *source = static_cast<const char *>(from);
    const ptrdiff_t past = ptrdiff_t(reinterpret_cast<uintptr_t>(target) % 64), gap = past ? 64 - past : 0;
    const ptrdiff_t head = gap < bytes ? gap : bytes;
    std::memcpy(target, source, size_t(head));
    ptrdiff_t i = head;
    for (; i + 64 <= bytes; i += 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(target + i), _mm512_loadu_si512(source + i));
#else
        for (int k = 0; k < 64; k += 16)
            _mm_stream_si128(
                reinterpret_cast<__m128i *>(target + i + k),
                _mm_loadu_si128(reinterpret_cast<const __m128i *>(source + i + k)));
#endif
    }
    std::memcpy(target + i, source + i, size_t(bytes - i));
#else
    std::memcpy(to, from, size_t(bytes));
#endif
}
inline void stream_done() {
#ifdef GRCSF_X86
    _mm_sfence();
#endif
}

// exp of x <= 0: exactly 1 at 0, 0 below the smallest normal number, NaN for NaN; the relative error is below
// 1e-7 (1 + |x|). 2 ** n times a polynomial in the rest of the exponent, of least relative error on [-1/2, 1/2].
inline Vector<float> exponential(Vector<float> x) {
    using V = Vector<float>;
    const float lowest = -87.3f, log2_e = 1.44269504f;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const V magic = broadcast(12582912.0f);
    const V shifted = x * log2_e + magic;
    const V n = shifted - magic;
    const V r = x * log2_e - n;
    V p = broadcast(1.5345812010e-4f);
    p = p * r + 1.3399931219e-3f;
    p = p * r + 9.6184889571e-3f;
    p = p * r + 5.5503287770e-2f;
    p = p * r + 2.4022646891e-1f;
    p = p * r + 6.9314720574e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
    return (V)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
    using I = VectorOf<float>::integer;
    const V zero{};
    const I below = x < broadcast(lowest);
    // Adds n to the exponent, which would take NaN to a number.
    VectorOf<float>::bits bits, exponent;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof bits);
    const V not_a_number = x + zero;
    p = x == x ? p : not_a_number;
    return below ? zero : p;
#endif
}
inline Vector<double> exponential(Vector<double> x) {
    for (int i = 0; i < lanes<double>; ++i)
        x[i] = std::exp(x[i]);
    return x;
}

// What a matrix product begins with.
enum class Start { zero, result, rows, matrix };

// Rows by vectors of a block of the result that stays in registers: 16 accumulators of 32, as AVX-512 and NEON have, 8 of the
// others' 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int block_rows = 8;
#else
constexpr int block_rows = 4;
#endif
constexpr int block_vectors = 2;

template <class A> struct Operands {
    const A *a;  // element (m, k) at m * a_row + k * a_step
    ptrdiff_t a_row, a_step;
    const A *b;  // element (k, n) at k * b_row + n
    ptrdiff_t b_row;
    A *c;  // element (m, n) at m * c_row + n
    ptrdiff_t c_row;
    const A *start;  // Start::rows: one number a row; Start::matrix: laid out as start_row says
    ptrdiff_t start_row;
};

template <class A, int Rows, int Vectors, Start start>
inline void multiply_block(ptrdiff_t depth, const Operands<A> &of, ptrdiff_t m, ptrdiff_t n) {
    using V = Vector<A>;
    V total[Rows][Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) {
            const ptrdiff_t column = n + j * lanes<A>;
            if constexpr (start == Start::zero)
                total[i][j] = V{};
            else if constexpr (start == Start::result)
                total[i][j] = load(of.c + (m + i) * of.c_row + column);
            else if constexpr (start == Start::rows)
                total[i][j] = broadcast(of.start[m + i]);
            else
                total[i][j] = load(of.start + (m + i) * of.start_row + column);
        }
    const A *a = of.a + m * of.a_row;
    const A *b = of.b + n;
    for (ptrdiff_t k = 0; k < depth; ++k, a += of.a_step, b += of.b_row) {
        V right[Vectors];
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j)
            right[j] = load(b + j * lanes<A>);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
            const V left = broadcast(a[i * of.a_row]);
#pragma GCC unroll 2
            for (int j = 0; j < Vectors; ++j)
                total[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j)
            store(of.c + (m + i) * of.c_row + n + j * lanes<A>, total[i][j]);
}

// Vectors * lanes columns.
template <class A, int Vectors, Start start>
inline void multiply_columns(ptrdiff_t rows, ptrdiff_t depth, const Operands<A> &of, ptrdiff_t n = 0) {
    ptrdiff_t m = 0;
    for (; m + block_rows <= rows; m += block_rows)
        multiply_block<A, block_rows, Vectors, start>(depth, of, m, n);
    if (m + 4 <= rows) {
        multiply_block<A, 4, Vectors, start>(depth, of, m, n);
        m += 4;
    }
    for (; m < rows; ++m)
        multiply_block<A, 1, Vectors, start>(depth, of, m, n);
}

// Calls `body` with a number of vectors, known when compiling, and the first of that many columns.
template <class A, class Body> inline void for_columns(ptrdiff_t columns, const Body &body) {
    ptrdiff_t n = 0;
    for (; n + block_vectors * lanes<A> <= columns; n += block_vectors * lanes<A>)
        body(std::integral_constant<int, block_vectors>{}, n);
    for (; n < columns; n += lanes<A>)
        body(std::integral_constant<int, 1>{}, n);
}

// C = start + A B, for `columns` a multiple of the lanes. Each element is summed over k in order, whatever the blocks.
template <class A, Start start>
void multiply(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t depth, const Operands<A> &of) {
    for_columns<A>(columns, [&](auto vectors, ptrdiff_t n) {
        multiply_columns<A, vectors, start>(rows, depth, of, n);
    });
}

// (rows, columns) -> (columns, rows).
template <class A>
inline void transpose_edge(
    A *to, ptrdiff_t to_row, const A *from, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t columns) {
    for (ptrdiff_t j = 0; j < columns; ++j)
        for (ptrdiff_t i = 0; i < rows; ++i)
            to[j * to_row + i] = from[i * from_row + j];
}

#if defined(__GNUC__) && !defined(__clang__)
// A square of vectors, in log2(lanes) rounds of exchanges.
template <class A> inline void transpose_square(A *to, ptrdiff_t to_row, const A *from, ptrdiff_t from_row) {
    constexpr int n = lanes<A>;
    using I = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    typedef I Mask __attribute__((vector_size(vector_bytes)));
    Vector<A> row[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
        row[i] = load(from + i * from_row);
#pragma GCC unroll 4
    for (int step = 1; step < n; step *= 2) {
        Mask low, high;
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) {
            low[k] = k & step ? n + k - step : k;
            high[k] = k & step ? n + k : k + step;
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i)
            if (!(i & step)) {
                const Vector<A> first = row[i], second = row[i + step];
                row[i] = __builtin_shuffle(first, second, low);
                row[i + step] = __builtin_shuffle(first, second, high);
            }
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
        store(to + i * to_row, row[i]);
}
#else
template <class A> inline void transpose_square(A *to, ptrdiff_t to_row, const A *from, ptrdiff_t from_row) {
    transpose_edge(to, to_row, from, from_row, lanes<A>, lanes<A>);
}
#endif

template <class A>
inline void transpose(A *to, ptrdiff_t to_row, const A *from, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t columns) {
    constexpr ptrdiff_t n = lanes<A>;
    ptrdiff_t r = 0;
    for (; r + n <= rows; r += n) {
        ptrdiff_t c = 0;
        for (; c + n <= columns; c += n)
            transpose_square(to + c * to_row + r, to_row, from + r * from_row + c, from_row);
        transpose_edge(to + c * to_row + r, to_row, from + r * from_row + c, from_row, n, columns - c);
    }
    transpose_edge(to + r, to_row, from + r * from_row, from_row, rows - r, columns);
}

// Working memory of each thread, `numbers` of them, aligned to cache lines.
template <class A> struct Scratch {
    Scratch(ptrdiff_t numbers, int threads) : each(grcsf::padded(numbers)) {
        const size_t bytes = size_t(each) * sizeof(A) * size_t(threads);
        // One allocation before the threads start, where a failure can still be reported.
        all = static_cast<A *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        if (!all)
            throw std::bad_alloc();
    }
    ~Scratch() { std::free(all); }
    Scratch(const Scratch &) = delete;
    A *of(int thread) const { return all + each * thread; }
    ptrdiff_t each;
    A *all;
};

}  // namespace
