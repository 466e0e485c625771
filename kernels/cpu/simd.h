// Vectors of one instruction set, and what both kernels build on: conversions, exp, a small matrix product.
//
// gcu.cpp and rcu.cpp are compiled once for each instruction set, with GRCSF_ISA naming the namespace, so nothing here
// may have external linkage: two copies of an inline function would be merged, and the wrong one could win.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <limits>
#include <new>
#include <type_traits>

#include <omp.h>

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
};
template <> struct VectorOf<double> {
    typedef double type __attribute__((vector_size(vector_bytes)));
    typedef double unaligned __attribute__((vector_size(vector_bytes), aligned(8), may_alias));
    typedef int64_t integer __attribute__((vector_size(vector_bytes)));
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

// Rows of p numbers; the common widths become one or two moves.
template <class To, class From> inline void convert_row(To *to, const From *from, ptrdiff_t count) {
    using A = typename Accumulate<To>::type;
    for (ptrdiff_t i = 0; i < count; ++i)
        to[i] = narrow<To>(A(widen(from[i])));
}
template <class T> inline void convert_row(T *to, const T *from, ptrdiff_t count) {
    switch (count) {
    case 4: std::memcpy(to, from, 4 * sizeof(T)); break;
    case 8: std::memcpy(to, from, 8 * sizeof(T)); break;
    case 16: std::memcpy(to, from, 16 * sizeof(T)); break;
    default: std::memcpy(to, from, size_t(count) * sizeof(T));
    }
}

// exp of x <= 0 to 2 ulp; exactly 0 below the smallest normal number, NaN for NaN.
inline Vector<float> exponential(Vector<float> x) {
    using V = Vector<float>;
    using I = VectorOf<float>::integer;
    const float lowest = -87.3f;
    const I below = x < broadcast(lowest);
    const V clamped = below ? broadcast(lowest) : x;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const V magic = broadcast(12582912.0f);
    const V shifted = clamped * 1.44269504f + magic;
    const V n = shifted - magic;
    V r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    I exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    const I scale_bits = (exponent + 127) << 23;
    V scale;
    std::memcpy(&scale, &scale_bits, sizeof scale);
    const V zero{};
    return below ? zero : p * scale;
}
inline Vector<double> exponential(Vector<double> x) {
    for (int i = 0; i < lanes<double>; ++i)
        x[i] = std::exp(x[i]);
    return x;
}

// What a matrix product begins with.
enum class Start { zero, result, rows, matrix };

// Rows by vectors of a block of the result that stays in registers: 16 accumulators of AVX-512's 32, 8 of the others' 16.
constexpr int block_vectors = 2;
constexpr int block_rows = vector_bytes == 64 ? 8 : 4;

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

template <class A, int Vectors, Start start>
inline void multiply_columns(ptrdiff_t rows, ptrdiff_t depth, const Operands<A> &of, ptrdiff_t n) {
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

// C = start + A B, for `columns` a multiple of the lanes. Each element is summed over k in order, whatever the blocks.
template <class A, Start start>
void multiply(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t depth, const Operands<A> &of) {
    ptrdiff_t n = 0;
    for (; n + block_vectors * lanes<A> <= columns; n += block_vectors * lanes<A>)
        multiply_columns<A, block_vectors, start>(rows, depth, of, n);
    for (; n < columns; n += lanes<A>)
        multiply_columns<A, 1, start>(rows, depth, of, n);
}

// A multiple of the lanes of every instruction set.
inline ptrdiff_t padded(ptrdiff_t count) { return (count + 15) / 16 * 16; }

// (rows, columns) -> (columns, rows).
template <class A>
inline void transpose(A *to, ptrdiff_t to_row, const A *from, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t columns) {
    constexpr ptrdiff_t tile = 8;
    for (ptrdiff_t r = 0; r < rows; r += tile)
        for (ptrdiff_t c = 0; c < columns; c += tile)
            for (ptrdiff_t j = c; j < c + tile && j < columns; ++j)
                for (ptrdiff_t i = r; i < r + tile && i < rows; ++i)
                    to[j * to_row + i] = from[i * from_row + j];
}

// Working memory of each thread, `numbers` of them, aligned to cache lines.
template <class A> struct Scratch {
    explicit Scratch(ptrdiff_t numbers) : each((numbers + 15) / 16 * 16) {
        const size_t bytes = size_t(each) * sizeof(A) * size_t(omp_get_max_threads());
        // One allocation before the threads start, where a failure can still be reported.
        all = static_cast<A *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        if (!all)
            throw std::bad_alloc();
    }
    ~Scratch() { std::free(all); }
    Scratch(const Scratch &) = delete;
    A *mine() const { return all + each * omp_get_thread_num(); }
    ptrdiff_t each;
    A *all;
};

}  // namespace
