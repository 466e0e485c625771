// The weight of a convolution with three taps an axis at the points where conv.cpp multiplies, for the convolution itself
// or, turned, for the gradient of what goes into it: input and output channels change places, and the taps their order.
//
// A row of the transform is the value at a point of the polynomial of which the three taps are coefficients, and what the
// inputs' and outputs' transforms leave to it. Computed in double.

#include "kernels.h"
#include "simd.h"

namespace {

using namespace grcsf;

constexpr ptrdiff_t panel = conv_panel;
constexpr double p = conv_near_point, q = conv_far_point;

// Of the channels of a panel side by side.
struct Numbers {
    double of[panel];
};

inline void transform_line(Numbers *__restrict to, const Numbers &a, const Numbers &b, const Numbers &c) {
    constexpr double first = conv_at_zero, near = conv_at_near, far = conv_at_far;
GRCSF_INDEPENDENT
    for (ptrdiff_t i = 0; i < panel; ++i) {
        const double even_p = a.of[i] + p * p * c.of[i], odd_p = p * b.of[i];
        const double even_q = a.of[i] + q * q * c.of[i], odd_q = q * b.of[i];
        to[0].of[i] = first * a.of[i];
        to[1].of[i] = near * (even_p + odd_p);
        to[2].of[i] = near * (even_p - odd_p);
        to[3].of[i] = far * (even_q + odd_q);
        to[4].of[i] = far * (even_q - odd_q);
        to[5].of[i] = c.of[i];
    }
}

template <class S> void transform_filters(const ConvFilters &call) {
    using A = typename Accumulate<S>::type;
    const ptrdiff_t planes = call.planar ? 1 : 3, taps = 9 * planes;
    const ptrdiff_t inputs = call.turned ? call.out_channels : call.in_channels;
    const ptrdiff_t outputs = call.turned ? call.in_channels : call.out_channels;
    const ptrdiff_t panels = conv_panels(outputs);
    // Between two output channels of the weight, and two input channels.
    const ptrdiff_t output_step = taps * (call.turned ? 1 : call.in_channels);
    const ptrdiff_t input_step = taps * (call.turned ? call.in_channels : 1);
    each(call.threads, panels * planes * inputs, [&](ptrdiff_t unit, int) {
        const ptrdiff_t one = unit / (planes * inputs), input = unit % (planes * inputs);
        const ptrdiff_t plane = input / inputs;
        const S *from = static_cast<const S *>(call.weight) + one * panel * output_step + input % inputs * input_step;
        const ptrdiff_t channels = outputs - one * panel < panel ? outputs - one * panel : panel;
        Numbers given[9] = {};
        for (ptrdiff_t tap = 0; tap < 9; ++tap) {
            const ptrdiff_t place = call.turned ? taps - 1 - 9 * plane - tap : 9 * plane + tap;
            for (ptrdiff_t i = 0; i < channels; ++i)
                given[tap].of[i] = widen(from[i * output_step + place]);
        }
        Numbers columns[3][6];
        for (ptrdiff_t j = 0; j < 3; ++j)
            transform_line(columns[j], given[j], given[3 + j], given[6 + j]);
        A *to = static_cast<A *>(call.filters) + (one * planes * inputs + input) * panel;
        const ptrdiff_t point_step = panels * planes * inputs * panel;
        for (ptrdiff_t i = 0; i < 6; ++i) {
            Numbers row[6];
            transform_line(row, columns[0][i], columns[1][i], columns[2][i]);
            for (ptrdiff_t j = 0; j < 6; ++j)
                for (ptrdiff_t k = 0; k < panel; ++k)
                    to[(6 * i + j) * point_step + k] = A(row[j].of[k]);
        }
    });
}

}  // namespace

namespace grcsf {
namespace GRCSF_ISA {
void (*const conv_filters[dtypes])(const ConvFilters &) = {
    transform_filters<float>, nullptr, transform_filters<double>};  // half precision comes widened
}  // namespace GRCSF_ISA
}  // namespace grcsf
