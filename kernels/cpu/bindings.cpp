// The Python module: addresses and sizes by name in, nothing out. PyTorch allocates; grcsf_fast/ops/cpp.py and
// cpp_stages.py check and call.

#include "kernels.h"

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace grcsf {

ptrdiff_t gcu_units_an_image(const GcuShape &shape) {
    const ptrdiff_t length = shape.planar ? shape.height / 2 : shape.depth / 2;
    const ptrdiff_t step = shape.planar ? unit_rows : unit_planes;
    return (length + step - 1) / step;
}

ptrdiff_t rcu_units_an_image(const RcuShape &shape) {
    const ptrdiff_t p = shape.patch;
    const ptrdiff_t patches = (shape.planar ? 1 : shape.depth / p) * (shape.height / p) * (shape.width / p);
    // Enough parts for many cores, few enough that their sums stay small: 16 to 64, of 16 MB of floats in all.
    const ptrdiff_t tokens = shape.planar ? p * p : p * p * p;
    const ptrdiff_t numbers = 2 * shape.maps * shape.heads * shape.residual * shape.channels +
                              shape.heads * tokens * tokens + shape.width_of_scorer * shape.channels;
    ptrdiff_t units = (ptrdiff_t(1) << 22) / numbers;
    units = units < 16 ? 16 : units > 64 ? 64 : units;
    const ptrdiff_t wanted = shape.batch ? (units + shape.batch - 1) / shape.batch : 1;
    return wanted < patches ? wanted : patches;
}

}  // namespace grcsf

namespace {

using namespace grcsf;

enum Isa { baseline_isa = 0, avx2_isa = 1, avx512_isa = 2 };
const char *const isa_names[] = {"baseline", "avx2", "avx512"};

int best_isa() {
#ifdef GRCSF_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 ? avx512_isa : avx2 ? avx2_isa : baseline_isa;
#else
    return baseline_isa;
#endif
}

template <class Call>
void run(
    int isa, int dtype, void (*const lowest[])(const Call &), void (*const middle[])(const Call &),
    void (*const highest[])(const Call &), const Call &call) {
    if (isa < 0 || isa > best_isa())
        throw std::invalid_argument("this processor cannot run instruction set " + std::to_string(isa));
    const auto table = isa == avx512_isa ? highest : isa == avx2_isa ? middle : lowest;
    if (dtype < 0 || dtype >= dtypes || !table[dtype])
        throw std::invalid_argument("no such dtype: " + std::to_string(dtype));
    py::gil_scoped_release unlocked;
    table[dtype](call);
}

#ifdef GRCSF_X86
#define GRCSF_RUN(isa, dtype, name, call) run(isa, dtype, baseline::name, avx2::name, avx512::name, call)
#else
#define GRCSF_RUN(isa, dtype, name, call) run(isa, dtype, baseline::name, baseline::name, baseline::name, call)
#endif

using Sizes = std::map<std::string, ptrdiff_t>;
using Addresses = std::map<std::string, uintptr_t>;

// Members of a structure by their names; a name that is missing or left over is an error.
template <class Value> class Named {
public:
    explicit Named(const std::map<std::string, Value> &all) : all_(all) {}
    Value take(const std::string &name) {
        const auto found = all_.find(name);
        if (found == all_.end())
            throw std::invalid_argument("missing: " + name);
        ++used_;
        return found->second;
    }
    template <class Pointer> void take(const std::string &name, Pointer &to) {
        to = reinterpret_cast<Pointer>(take(name));
    }
    void end() const {
        if (used_ != all_.size())
            throw std::invalid_argument("expected " + std::to_string(used_) + " names, got " + std::to_string(all_.size()));
    }

private:
    const std::map<std::string, Value> &all_;
    size_t used_ = 0;
};

#define GRCSF_TAKE(from, call, member) from.take(#member, (call).member)

GcuShape gcu_shape(const Sizes &sizes) {
    Named<ptrdiff_t> from(sizes);
    const GcuShape shape{
        from.take("batch"), from.take("channels"), from.take("depth"), from.take("height"), from.take("width"),
        from.take("planar") != 0};
    from.end();
    return shape;
}

RcuShape rcu_shape(const Sizes &sizes) {
    Named<ptrdiff_t> from(sizes);
    const RcuShape shape{
        from.take("batch"), from.take("channels"), from.take("maps"), from.take("residual"), from.take("heads"),
        from.take("width_of_scorer"), from.take("depth"), from.take("height"), from.take("width"), from.take("patch"),
        from.take("planar") != 0, from.take("image_step"), from.take("map_step")};
    from.end();
    return shape;
}

template <class Call> void take_gcu_inputs(Named<uintptr_t> &from, Call &call) {
    GRCSF_TAKE(from, call, features), GRCSF_TAKE(from, call, coarse);
    GRCSF_TAKE(from, call, feature_gate), GRCSF_TAKE(from, call, coarse_gate), GRCSF_TAKE(from, call, strength);
}

template <class Call> void take_rcu_inputs(Named<uintptr_t> &from, Call &call) {
    GRCSF_TAKE(from, call, x), GRCSF_TAKE(from, call, keys), GRCSF_TAKE(from, call, values);
    RcuWeights &weights = call.weights;
    GRCSF_TAKE(from, weights, query_weight), GRCSF_TAKE(from, weights, query_bias);
    GRCSF_TAKE(from, weights, position_bias);
    GRCSF_TAKE(from, weights, output_weight), GRCSF_TAKE(from, weights, output_bias);
    GRCSF_TAKE(from, weights, score_weight), GRCSF_TAKE(from, weights, score_context);
    GRCSF_TAKE(from, weights, score_vector), GRCSF_TAKE(from, weights, score_bias);
}

void call_gcu_forward(int isa, int dtype, int threads, const Sizes &sizes, double eps, const Addresses &addresses) {
    GcuForward call{};
    call.shape = gcu_shape(sizes), call.eps = eps, call.threads = threads;
    Named<uintptr_t> from(addresses);
    take_gcu_inputs(from, call);
    GRCSF_TAKE(from, call, compensated), GRCSF_TAKE(from, call, residual);
    from.end();
    GRCSF_RUN(isa, dtype, gcu_forward, call);
}

void call_gcu_backward(int isa, int dtype, int threads, const Sizes &sizes, double eps, const Addresses &addresses) {
    GcuBackward call{};
    call.shape = gcu_shape(sizes), call.eps = eps, call.threads = threads;
    Named<uintptr_t> from(addresses);
    take_gcu_inputs(from, call);
    GRCSF_TAKE(from, call, compensated_grad), GRCSF_TAKE(from, call, residual_grad);
    GRCSF_TAKE(from, call, features_grad), GRCSF_TAKE(from, call, coarse_grad);
    GRCSF_TAKE(from, call, feature_gate_parts), GRCSF_TAKE(from, call, coarse_gate_parts);
    GRCSF_TAKE(from, call, strength_parts);
    from.end();
    GRCSF_RUN(isa, dtype, gcu_backward, call);
}

void call_rcu_forward(
    int isa, int dtype, int threads, const Sizes &sizes, double threshold, const Addresses &addresses) {
    RcuForward call{};
    call.shape = rcu_shape(sizes), call.threshold = threshold, call.threads = threads;
    Named<uintptr_t> from(addresses);
    take_rcu_inputs(from, call);
    GRCSF_TAKE(from, call, out), GRCSF_TAKE(from, call, score);
    from.end();
    GRCSF_RUN(isa, dtype, rcu_forward, call);
}

void call_rcu_backward(
    int isa, int dtype, int threads, const Sizes &sizes, double threshold, const Addresses &addresses) {
    RcuBackward call{};
    call.shape = rcu_shape(sizes), call.threshold = threshold, call.threads = threads;
    Named<uintptr_t> from(addresses);
    take_rcu_inputs(from, call);
    GRCSF_TAKE(from, call, out_grad), GRCSF_TAKE(from, call, score_grad);
    GRCSF_TAKE(from, call, x_grad), GRCSF_TAKE(from, call, keys_grad), GRCSF_TAKE(from, call, values_grad);
    GRCSF_TAKE(from, call, query_weight_parts), GRCSF_TAKE(from, call, query_bias_parts);
    GRCSF_TAKE(from, call, position_bias_parts);
    GRCSF_TAKE(from, call, output_weight_parts), GRCSF_TAKE(from, call, output_bias_parts);
    GRCSF_TAKE(from, call, score_weight_parts), GRCSF_TAKE(from, call, score_context_parts);
    GRCSF_TAKE(from, call, score_vector_parts), GRCSF_TAKE(from, call, score_bias_parts);
    from.end();
    GRCSF_RUN(isa, dtype, rcu_backward, call);
}

void call_norm_forward(
    int isa, int dtype, int threads, const Sizes &sizes, double eps, double slope, const Addresses &addresses) {
    NormForward call{};
    Named<ptrdiff_t> shape(sizes);
    call.batch = shape.take("batch"), call.channels = shape.take("channels"), call.pixels = shape.take("pixels");
    shape.end();
    call.threads = threads, call.eps = eps, call.slope = slope;
    Named<uintptr_t> from(addresses);
    GRCSF_TAKE(from, call, x), GRCSF_TAKE(from, call, weight), GRCSF_TAKE(from, call, bias);
    GRCSF_TAKE(from, call, out), GRCSF_TAKE(from, call, statistics);
    from.end();
    GRCSF_RUN(isa, dtype, norm_forward, call);
}

void call_norm_backward(int isa, int dtype, int threads, const Sizes &sizes, double slope, const Addresses &addresses) {
    NormBackward call{};
    Named<ptrdiff_t> shape(sizes);
    call.batch = shape.take("batch"), call.channels = shape.take("channels"), call.pixels = shape.take("pixels");
    shape.end();
    call.threads = threads, call.slope = slope;
    Named<uintptr_t> from(addresses);
    GRCSF_TAKE(from, call, out_grad), GRCSF_TAKE(from, call, x), GRCSF_TAKE(from, call, weight);
    GRCSF_TAKE(from, call, bias), GRCSF_TAKE(from, call, statistics), GRCSF_TAKE(from, call, x_grad);
    GRCSF_TAKE(from, call, weight_parts), GRCSF_TAKE(from, call, bias_parts);
    from.end();
    GRCSF_RUN(isa, dtype, norm_backward, call);
}

template <class Call> Call pool_call(int threads, const Sizes &sizes) {
    Call call{};
    Named<ptrdiff_t> shape(sizes);
    call.planes = shape.take("planes"), call.depth = shape.take("depth"), call.height = shape.take("height");
    call.width = shape.take("width"), call.planar = shape.take("planar") != 0, call.threads = threads;
    shape.end();
    return call;
}

void call_pool_forward(int isa, int dtype, int threads, const Sizes &sizes, const Addresses &addresses) {
    auto call = pool_call<PoolForward>(threads, sizes);
    Named<uintptr_t> from(addresses);
    GRCSF_TAKE(from, call, x), GRCSF_TAKE(from, call, out), GRCSF_TAKE(from, call, mean);
    from.end();
    GRCSF_RUN(isa, dtype, pool_forward, call);
}

void call_pool_backward(int isa, int dtype, int threads, const Sizes &sizes, const Addresses &addresses) {
    auto call = pool_call<PoolBackward>(threads, sizes);
    Named<uintptr_t> from(addresses);
    GRCSF_TAKE(from, call, largest_grad), GRCSF_TAKE(from, call, mean_grad), GRCSF_TAKE(from, call, x);
    GRCSF_TAKE(from, call, x_grad);
    from.end();
    GRCSF_RUN(isa, dtype, pool_backward, call);
}

template <class Call> Call conv_sizes(int threads, const Sizes &sizes) {
    Call call{};
    Named<ptrdiff_t> shape(sizes);
    call.batch = shape.take("batch"), call.in_channels = shape.take("in_channels");
    call.out_channels = shape.take("out_channels"), call.depth = shape.take("depth");
    call.height = shape.take("height"), call.width = shape.take("width"), call.planar = shape.take("planar") != 0;
    if constexpr (std::is_same_v<Call, ConvForward>)
        call.first_channels = shape.take("first_channels");
    shape.end();
    call.threads = threads;
    return call;
}

ConvForward conv_call(int threads, const Sizes &sizes, const Addresses &addresses) {
    ConvForward call = conv_sizes<ConvForward>(threads, sizes);
    Named<uintptr_t> from(addresses);
    GRCSF_TAKE(from, call, x), GRCSF_TAKE(from, call, more), GRCSF_TAKE(from, call, weight);
    GRCSF_TAKE(from, call, bias), GRCSF_TAKE(from, call, out);
    from.end();
    return call;
}

void call_conv_filters(int isa, int dtype, int threads, const Sizes &sizes, const Addresses &addresses) {
    ConvFilters call{};
    Named<ptrdiff_t> shape(sizes);
    call.in_channels = shape.take("in_channels"), call.out_channels = shape.take("out_channels");
    call.planar = shape.take("planar") != 0, call.turned = shape.take("turned") != 0, call.threads = threads;
    shape.end();
    Named<uintptr_t> from(addresses);
    GRCSF_TAKE(from, call, weight), GRCSF_TAKE(from, call, filters);
    from.end();
    GRCSF_RUN(isa, dtype, conv_filters, call);
}

void call_conv_weight_grad(int isa, int dtype, int threads, const Sizes &sizes, const Addresses &addresses) {
    ConvWeightGrad call = conv_sizes<ConvWeightGrad>(threads, sizes);
    Named<uintptr_t> from(addresses);
    GRCSF_TAKE(from, call, out_grad), GRCSF_TAKE(from, call, x), GRCSF_TAKE(from, call, weight_grad);
    from.end();
    GRCSF_RUN(isa, dtype, conv_weight_grad, call);
}

void call_conv_forward(int isa, int dtype, int threads, const Sizes &sizes, const Addresses &addresses) {
    GRCSF_RUN(isa, dtype, conv_forward, conv_call(threads, sizes, addresses));
}

void call_upsample_forward(int isa, int dtype, int threads, const Sizes &sizes, const Addresses &addresses) {
    GRCSF_RUN(isa, dtype, upsample_forward, conv_call(threads, sizes, addresses));
}

void call_attention_forward(int isa, int dtype, int threads, const Sizes &sizes, const Addresses &addresses) {
    AttentionForward call{};
    Named<ptrdiff_t> shape(sizes);
    call.batch = shape.take("batch"), call.heads = shape.take("heads"), call.width = shape.take("width");
    call.wanted = shape.take("wanted"), call.tokens = shape.take("tokens");
    call.query_image = shape.take("query_image"), call.query_row = shape.take("query_row");
    call.key_image = shape.take("key_image"), call.key_row = shape.take("key_row");
    call.value_image = shape.take("value_image"), call.value_row = shape.take("value_row");
    shape.end();
    call.threads = threads;
    Named<uintptr_t> from(addresses);
    GRCSF_TAKE(from, call, queries), GRCSF_TAKE(from, call, keys), GRCSF_TAKE(from, call, values);
    GRCSF_TAKE(from, call, out);
    from.end();
    GRCSF_RUN(isa, dtype, attention_forward, call);
}

void call_bias_gelu_forward(int isa, int dtype, int threads, const Sizes &sizes, const Addresses &addresses) {
    BiasGeluForward call{};
    Named<ptrdiff_t> shape(sizes);
    call.rows = shape.take("rows"), call.columns = shape.take("columns"), call.threads = threads;
    shape.end();
    Named<uintptr_t> from(addresses);
    GRCSF_TAKE(from, call, x), GRCSF_TAKE(from, call, bias);
    from.end();
    GRCSF_RUN(isa, dtype, bias_gelu_forward, call);
}

// (parts, numbers) -> (numbers), in the order of the parts whatever the threads.
template <class A> void sum_parts_as(ptrdiff_t parts, ptrdiff_t numbers, uintptr_t from, uintptr_t to) {
    const A *part = reinterpret_cast<const A *>(from);
    A *total = reinterpret_cast<A *>(to);
    for (ptrdiff_t i = 0; i < numbers; ++i)
        total[i] = 0;
    for (ptrdiff_t p = 0; p < parts; ++p, part += numbers)
        for (ptrdiff_t i = 0; i < numbers; ++i)
            total[i] += part[i];
}

void sum_parts(bool is_double, ptrdiff_t parts, ptrdiff_t numbers, uintptr_t from, uintptr_t to) {
    py::gil_scoped_release unlocked;
    (is_double ? sum_parts_as<double> : sum_parts_as<float>)(parts, numbers, from, to);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "C++ kernels of grcsf_fast; called by grcsf_fast.ops alone.";
#ifdef _OPENMP
    module.attr("openmp") = true;
#else
    module.attr("openmp") = false;
#endif
    module.def("instruction_sets", [] {
        return std::vector<std::string>(isa_names, isa_names + best_isa() + 1);
    });
    module.def("gcu_units", [](const Sizes &sizes) { return gcu_units_an_image(gcu_shape(sizes)); });
    module.def("rcu_units", [](const Sizes &sizes) { return rcu_units_an_image(rcu_shape(sizes)); });
    module.def("padded", padded);
    module.def("rcu_padded_tokens", [](ptrdiff_t tokens) { return rcu_blocks(tokens).padded_tokens; });
    module.def("gcu_forward", call_gcu_forward);
    module.def("gcu_backward", call_gcu_backward);
    module.def("rcu_forward", call_rcu_forward);
    module.def("rcu_backward", call_rcu_backward);
    module.def("norm_forward", call_norm_forward);
    module.def("norm_backward", call_norm_backward);
    module.def("pool_forward", call_pool_forward);
    module.def("pool_backward", call_pool_backward);
    module.def("conv_filters", call_conv_filters);
    module.def("conv_weight_grad", call_conv_weight_grad);
    module.def("conv_forward", call_conv_forward);
    module.def("upsample_forward", call_upsample_forward);
    module.def("attention_forward", call_attention_forward);
    module.def("bias_gelu_forward", call_bias_gelu_forward);
    module.attr("conv_panel") = conv_panel;
    module.def("sum_parts", sum_parts);
}
