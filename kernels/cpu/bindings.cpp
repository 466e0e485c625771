// The Python module: addresses and sizes in, nothing out. PyTorch allocates, grcsf_fast/ops/cpp.py checks and calls.

#include "kernels.h"

#include <cstdint>
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
    if (dtype < 0 || dtype >= dtypes)
        throw std::invalid_argument("no such dtype: " + std::to_string(dtype));
    const auto table = isa == avx512_isa ? highest : isa == avx2_isa ? middle : lowest;
    py::gil_scoped_release unlocked;
    table[dtype](call);
}

#ifdef GRCSF_X86
#define GRCSF_RUN(isa, dtype, name, call) run(isa, dtype, baseline::name, avx2::name, avx512::name, call)
#else
#define GRCSF_RUN(isa, dtype, name, call) run(isa, dtype, baseline::name, baseline::name, baseline::name, call)
#endif

using Numbers = std::vector<ptrdiff_t>;

// Addresses in the order of a structure's members.
class Addresses {
public:
    explicit Addresses(const std::vector<uintptr_t> &all, size_t count) : all_(all) {
        if (all.size() != count)
            throw std::invalid_argument("expected " + std::to_string(count) + " addresses");
    }
    template <class Pointer> void next(Pointer &to) { to = reinterpret_cast<Pointer>(all_[used_++]); }
    void next(RcuWeights &to) {
        next(to.query_weight), next(to.query_bias), next(to.position_bias), next(to.output_weight);
        next(to.output_bias), next(to.score_weight), next(to.score_context), next(to.score_vector);
        next(to.score_bias);
    }

private:
    const std::vector<uintptr_t> &all_;
    size_t used_ = 0;
};

GcuShape gcu_shape(const Numbers &of) {
    if (of.size() != 6)
        throw std::invalid_argument("expected 6 sizes");
    return {of[0], of[1], of[2], of[3], of[4], of[5] != 0};
}

RcuShape rcu_shape(const Numbers &of) {
    if (of.size() != 11)
        throw std::invalid_argument("expected 11 sizes");
    return {of[0], of[1], of[2], of[3], of[4], of[5], of[6], of[7], of[8], of[9], of[10] != 0};
}

void call_gcu_forward(int isa, int dtype, int threads, const Numbers &shape, double eps, const std::vector<uintptr_t> &addresses) {
    GcuForward call{};
    call.shape = gcu_shape(shape), call.eps = eps, call.threads = threads;
    Addresses from(addresses, 6);
    from.next(call.features), from.next(call.coarse), from.next(call.feature_gate), from.next(call.coarse_gate);
    from.next(call.compensated), from.next(call.residual);
    GRCSF_RUN(isa, dtype, gcu_forward, call);
}

void call_gcu_backward(int isa, int dtype, int threads, const Numbers &shape, double eps, const std::vector<uintptr_t> &addresses) {
    GcuBackward call{};
    call.shape = gcu_shape(shape), call.eps = eps, call.threads = threads;
    Addresses from(addresses, 10);
    from.next(call.features), from.next(call.coarse), from.next(call.feature_gate), from.next(call.coarse_gate);
    from.next(call.compensated_grad), from.next(call.residual_grad);
    from.next(call.features_grad), from.next(call.coarse_grad);
    from.next(call.feature_gate_parts), from.next(call.coarse_gate_parts);
    GRCSF_RUN(isa, dtype, gcu_backward, call);
}

void call_rcu_forward(
    int isa, int dtype, int threads, const Numbers &shape, double threshold, const std::vector<uintptr_t> &addresses) {
    RcuForward call{};
    call.shape = rcu_shape(shape), call.threshold = threshold, call.threads = threads;
    Addresses from(addresses, 14);
    from.next(call.x), from.next(call.keys), from.next(call.values), from.next(call.weights);
    from.next(call.out), from.next(call.score);
    GRCSF_RUN(isa, dtype, rcu_forward, call);
}

void call_rcu_backward(
    int isa, int dtype, int threads, const Numbers &shape, double threshold, const std::vector<uintptr_t> &addresses) {
    RcuBackward call{};
    call.shape = rcu_shape(shape), call.threshold = threshold, call.threads = threads;
    Addresses from(addresses, 26);
    from.next(call.x), from.next(call.keys), from.next(call.values), from.next(call.weights);
    from.next(call.out_grad), from.next(call.score_grad);
    from.next(call.x_grad), from.next(call.keys_grad), from.next(call.values_grad);
    from.next(call.query_weight), from.next(call.query_bias), from.next(call.position_bias);
    from.next(call.output_weight), from.next(call.output_bias), from.next(call.score_weight);
    from.next(call.score_context), from.next(call.score_vector), from.next(call.score_bias);
    GRCSF_RUN(isa, dtype, rcu_backward, call);
}

void call_norm_forward(
    int isa, int dtype, int threads, const Numbers &shape, double eps, double slope,
    const std::vector<uintptr_t> &addresses) {
    if (shape.size() != 3)
        throw std::invalid_argument("expected 3 sizes");
    NormForward call{};
    call.batch = shape[0], call.channels = shape[1], call.pixels = shape[2];
    call.threads = threads, call.eps = eps, call.slope = slope;
    Addresses from(addresses, 4);
    from.next(call.x), from.next(call.weight), from.next(call.bias), from.next(call.out);
    GRCSF_RUN(isa, dtype, norm_forward, call);
}

void call_pool_forward(int isa, int dtype, int threads, const Numbers &shape, const std::vector<uintptr_t> &addresses) {
    if (shape.size() != 5)
        throw std::invalid_argument("expected 5 sizes");
    PoolForward call{};
    call.planes = shape[0], call.depth = shape[1], call.height = shape[2], call.width = shape[3];
    call.planar = shape[4] != 0, call.threads = threads;
    Addresses from(addresses, 2);
    from.next(call.x), from.next(call.out);
    GRCSF_RUN(isa, dtype, pool_forward, call);
}

ConvForward conv_call(int threads, const Numbers &shape, const std::vector<uintptr_t> &addresses) {
    if (shape.size() != 7)
        throw std::invalid_argument("expected 7 sizes");
    ConvForward call{};
    call.batch = shape[0], call.in_channels = shape[1], call.out_channels = shape[2];
    call.depth = shape[3], call.height = shape[4], call.width = shape[5], call.planar = shape[6] != 0;
    call.threads = threads;
    Addresses from(addresses, 4);
    from.next(call.x), from.next(call.weight), from.next(call.bias), from.next(call.out);
    return call;
}

void call_conv_forward(int isa, int dtype, int threads, const Numbers &shape, const std::vector<uintptr_t> &addresses) {
    GRCSF_RUN(isa, dtype, conv_forward, conv_call(threads, shape, addresses));
}

void call_upsample_forward(
    int isa, int dtype, int threads, const Numbers &shape, const std::vector<uintptr_t> &addresses) {
    GRCSF_RUN(isa, dtype, upsample_forward, conv_call(threads, shape, addresses));
}

void call_attention_forward(
    int isa, int dtype, int threads, const Numbers &shape, const std::vector<uintptr_t> &addresses) {
    if (shape.size() != 11)
        throw std::invalid_argument("expected 11 sizes");
    AttentionForward call{};
    call.batch = shape[0], call.heads = shape[1], call.width = shape[2], call.wanted = shape[3], call.tokens = shape[4];
    call.query_image = shape[5], call.query_row = shape[6], call.key_image = shape[7], call.key_row = shape[8];
    call.value_image = shape[9], call.value_row = shape[10], call.threads = threads;
    Addresses from(addresses, 4);
    from.next(call.queries), from.next(call.keys), from.next(call.values), from.next(call.out);
    GRCSF_RUN(isa, dtype, attention_forward, call);
}

void call_bias_gelu_forward(
    int isa, int dtype, int threads, const Numbers &shape, const std::vector<uintptr_t> &addresses) {
    if (shape.size() != 2)
        throw std::invalid_argument("expected 2 sizes");
    BiasGeluForward call{};
    call.rows = shape[0], call.columns = shape[1], call.threads = threads;
    Addresses from(addresses, 2);
    from.next(call.x), from.next(call.bias);
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
    module.doc() = "C++ kernels of grcsf_fast; called by grcsf_fast.ops.cpp alone.";
    module.def("instruction_sets", [] {
        return std::vector<std::string>(isa_names, isa_names + best_isa() + 1);
    });
    module.def("gcu_units", [](const Numbers &shape) { return gcu_units_an_image(gcu_shape(shape)); });
    module.def("rcu_units", [](const Numbers &shape) { return rcu_units_an_image(rcu_shape(shape)); });
    module.def("rcu_padded_tokens", [](ptrdiff_t tokens) { return rcu_blocks(tokens).padded_tokens; });
    module.def("gcu_forward", call_gcu_forward);
    module.def("gcu_backward", call_gcu_backward);
    module.def("rcu_forward", call_rcu_forward);
    module.def("rcu_backward", call_rcu_backward);
    module.def("norm_forward", call_norm_forward);
    module.def("pool_forward", call_pool_forward);
    module.def("conv_forward", call_conv_forward);
    module.def("upsample_forward", call_upsample_forward);
    module.def("attention_forward", call_attention_forward);
    module.def("bias_gelu_forward", call_bias_gelu_forward);
    module.attr("conv_panel") = conv_panel;
    module.attr("conv_near_point") = conv_near_point;
    module.attr("conv_far_point") = conv_far_point;
    module.def("sum_parts", sum_parts);
}
