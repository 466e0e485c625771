// What bindings.cpp calls: one table of functions an instruction set.
#pragma once

#include <cstddef>

namespace grcsf {

// Storage of the large tensors. Gates, weights and every gradient of them are float, or double beside double.
enum Dtype { float32 = 0, bf16 = 1, float64 = 2, dtypes = 3 };

// features (batch, channels, depth, height, width), coarse the same with every axis halved; a 2-D image has depth 1,
// in both. Everything is dense and in C order.
struct GcuShape {
    ptrdiff_t batch, channels, depth, height, width;
    bool planar;  // 2-D: nothing is interpolated along depth
};

struct GcuForward {
    GcuShape shape;
    int threads;
    double eps;
    const void *features, *coarse, *feature_gate, *coarse_gate, *strength;
    void *compensated, *residual;
};

struct GcuBackward {
    GcuShape shape;
    int threads;
    double eps;
    const void *features, *coarse, *feature_gate, *coarse_gate, *strength, *compensated_grad, *residual_grad;
    // Null where nobody asks. Those of gates and strength are sums over parts, see below: (units, channels).
    void *features_grad, *coarse_grad, *feature_gate_parts, *coarse_gate_parts, *strength_parts;
};

// x (batch, channels, depth, height, width), keys and values (batch, maps, residual, depth, height, width); the latter are
// dense from `residual` on.
struct RcuShape {
    ptrdiff_t batch, channels, maps, residual, heads, width_of_scorer;
    ptrdiff_t depth, height, width, patch;
    bool planar;                      // 2-D: patches are one pixel deep
    ptrdiff_t image_step, map_step;  // numbers between two images and two maps of keys, and of values
};

// A multiple of the lanes of every instruction set. (Static: objects of different ones must not share a function.)
static inline ptrdiff_t padded(ptrdiff_t count) { return (count + 15) / 16 * 16; }

// A patch of more than 64 tokens goes in blocks of query tokens of one size, padded.
struct RcuBlocks {
    ptrdiff_t number, size, padded_tokens;
};
static inline RcuBlocks rcu_blocks(ptrdiff_t tokens) {
    const ptrdiff_t number = (tokens + 63) / 64;
    const ptrdiff_t size = padded((tokens + number - 1) / number);
    return {number, size, number * size};
}

struct RcuWeights {
    // Dense, float or double: query (maps * heads * residual, channels) and its bias carry the factor
    // residual ** -0.5; output (channels, maps * heads * residual); position (heads, key, query), the queries padded as
    // RcuBlocks says.
    const void *query_weight, *query_bias, *position_bias, *output_weight, *output_bias;
    const void *score_weight, *score_context, *score_vector, *score_bias;
};

struct RcuForward {
    RcuShape shape;
    int threads;
    double threshold;
    const void *x, *keys, *values;
    RcuWeights weights;
    void *out, *score;
};

// Gradients of the weights are sums over parts, see below, which come zeroed: (units, ...), the last axis padded, that
// of the position bias as in the weights. Null where nobody asks; query gradients are those of the scaled weights.
struct RcuBackward {
    RcuShape shape;
    int threads;
    double threshold;
    const void *x, *keys, *values;
    RcuWeights weights;
    const void *out_grad, *score_grad;
    void *x_grad, *keys_grad, *values_grad;
    void *query_weight_parts, *query_bias_parts, *position_bias_parts, *output_weight_parts, *output_bias_parts;
    void *score_weight_parts, *score_context_parts, *score_vector_parts, *score_bias_parts;
};

// x and out (batch, channels, pixels); weight and bias float, or double beside double. `statistics`, mean and deviation
// of each plane, (batch, 2, channels), may be null.
struct NormForward {
    ptrdiff_t batch, channels, pixels;
    int threads;
    double eps, slope;
    const void *x, *weight, *bias;
    void *out, *statistics;
};

// Gradients of weight and bias are left by image, (batch, channels).
struct NormBackward {
    ptrdiff_t batch, channels, pixels;
    int threads;
    double slope;
    const void *out_grad, *x, *weight, *bias, *statistics;
    void *x_grad, *weight_parts, *bias_parts;
};

// x (planes, depth, height, width); a 2-D image has depth 1 and keeps it. `mean`, of the same pixels, may be null.
struct PoolForward {
    ptrdiff_t planes, depth, height, width;
    bool planar;
    int threads;
    const void *x;
    void *out, *mean;
};

// The largest of each 2 x 2 (x 2) pixels of x, the first of several, gets the gradient of it; all get a share of the
// mean's.
struct PoolBackward {
    ptrdiff_t planes, depth, height, width;
    bool planar;
    int threads;
    const void *largest_grad, *mean_grad, *x;
    void *x_grad;
};

// x (batch, in_channels, depth, height, width) to out (batch, out_channels, the same), zeros around; a 2-D image has
// depth 1 and is not convolved along it. The weight is transformed and in panels of output channels, (36 points, panels,
// (taps along depth, in_channels), conv_panel), 0 beyond the last channel; it and the bias are float, or double beside
// double. Of the input channels the first ones lie in x, the others in `more`. upsample_forward takes the same, with all
// of them in x: its out has every axis doubled, but for the depth of a 2-D image, and its
// weight is (taps, out_channels, in_channels).
constexpr ptrdiff_t conv_panel = 8;
constexpr double conv_near_point = 0.625, conv_far_point = 1.5;
// What the transforms of inputs and outputs leave to that of the weight at 0, at the near and at the far points.
constexpr double conv_near_square = conv_near_point * conv_near_point, conv_far_square = conv_far_point * conv_far_point;
constexpr double conv_at_zero = 1 / (conv_near_square * conv_far_square);
constexpr double conv_at_near = 0.5 / (conv_near_square * (conv_near_square - conv_far_square));
constexpr double conv_at_far = 0.5 / (conv_far_square * (conv_far_square - conv_near_square));
static inline ptrdiff_t conv_panels(ptrdiff_t out_channels) { return (out_channels + conv_panel - 1) / conv_panel; }
struct ConvForward {
    ptrdiff_t batch, in_channels, first_channels, out_channels, depth, height, width;
    bool planar;
    int threads;
    const void *x, *more, *weight, *bias;
    void *out;
};

// weight (out_channels, in_channels, taps), 9 of them or 27, to the filters of ConvForward; turned: to those of the
// convolution from out_channels to in_channels that makes the gradient of x.
struct ConvFilters {
    ptrdiff_t in_channels, out_channels;
    bool planar, turned;
    int threads;
    const void *weight;
    void *filters;
};

// The gradient of the weight, (out_channels, in_channels, taps), float, or double beside double, from x
// (batch, in_channels, depth, height, width) and that of the outputs, which has as many pixels.
struct ConvWeightGrad {
    ptrdiff_t batch, in_channels, out_channels, depth, height, width;
    bool planar;
    int threads;
    const void *out_grad, *x;
    void *weight_grad;
};

// Queries (batch, wanted, heads * width), keys and values (batch, tokens, heads * width), whose rows and images lie as
// many numbers apart as said; out like the queries, dense.
struct AttentionForward {
    ptrdiff_t batch, heads, width, wanted, tokens;
    ptrdiff_t query_image, query_row, key_image, key_row, value_image, value_row;
    int threads;
    const void *queries, *keys, *values;
    void *out;
};

// x (rows, columns), overwritten; the bias (columns) is float, or double beside double.
struct BiasGeluForward {
    ptrdiff_t rows, columns;
    int threads;
    void *x;
    const void *bias;
};

// Parts into which a backward is divided. They depend on the shape alone, so that sums over them, made in order, do not
// depend on the threads. A GCU's part is a strip of coarse rows (2-D) or planes (3-D) of an image.
constexpr ptrdiff_t unit_rows = 16, unit_planes = 8;
ptrdiff_t gcu_units_an_image(const GcuShape &shape);
ptrdiff_t rcu_units_an_image(const RcuShape &shape);

#define GRCSF_DECLARE(isa) \
    namespace isa { \
    extern void (*const gcu_forward[dtypes])(const GcuForward &); \
    extern void (*const gcu_backward[dtypes])(const GcuBackward &); \
    extern void (*const rcu_forward[dtypes])(const RcuForward &); \
    extern void (*const rcu_backward[dtypes])(const RcuBackward &); \
    extern void (*const norm_forward[dtypes])(const NormForward &); \
    extern void (*const norm_backward[dtypes])(const NormBackward &); \
    extern void (*const pool_forward[dtypes])(const PoolForward &); \
    extern void (*const pool_backward[dtypes])(const PoolBackward &); \
    extern void (*const conv_filters[dtypes])(const ConvFilters &); \
    extern void (*const conv_weight_grad[dtypes])(const ConvWeightGrad &); \
    extern void (*const conv_forward[dtypes])(const ConvForward &); \
    extern void (*const upsample_forward[dtypes])(const ConvForward &); \
    extern void (*const attention_forward[dtypes])(const AttentionForward &); \
    extern void (*const bias_gelu_forward[dtypes])(const BiasGeluForward &); \
    }
GRCSF_DECLARE(avx512)
GRCSF_DECLARE(avx2)
GRCSF_DECLARE(baseline)
#undef GRCSF_DECLARE

}  // namespace grcsf
