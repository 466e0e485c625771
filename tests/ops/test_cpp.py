"""The C++ kernels: what only they promise. That they are right is shown with every backend's in test_every_op.py."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from awake import awake
from calling import arguments, grouped
from tolerances import tolerance
from torch._subclasses.fake_tensor import FakeTensorMode

from grcsf_fast import GRCSF, BackendUnavailableError, backend_info, functional, reference, use_backend
from grcsf_fast.errors import ArgumentError, ArgumentTypeError
from grcsf_fast.ops import backends, compiled, cpp, registered, triton
from grcsf_fast.ops.backends import select_backend

pytestmark = pytest.mark.skipif(cpp.problem() is not None, reason=f"no C++ kernels here: {cpp.problem()}")

OPS = [
    ("compensation_inputs", "global_compensation", {"spatial": (38, 70), "channels": 5}, {}),
    ("compensation_inputs", "global_compensation", {"spatial": (36, 6, 10), "channels": 3}, {}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (24, 40)}, {"patch_size": 8}),
    ("attention_inputs", "patch_cross_attention", {"spatial": (8, 12, 4)}, {"patch_size": 4}),
]


def with_gradients(op, inputs, settings):
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = op(*arguments(inputs), **settings)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, list(inputs.values()), incoming))


@pytest.fixture
def cpp_backend():
    with use_backend("cpp"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("maker", "name", "sizes", "settings"), OPS)
def test_bits_do_not_depend_on_the_threads_or_the_run(request, cpp_backend, maker, name, sizes, settings, dtype):
    inputs = request.getfixturevalue(maker)(**sizes, **settings, dtype=dtype)
    op = getattr(functional, name)
    results = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        results.append(with_gradients(op, inputs, settings))
    torch.set_num_threads(2)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, (750, 730)), (torch.bfloat16, (1022, 1090))])
def test_outputs_too_large_for_the_caches(compensation_inputs, cpp_backend, dtype, size):
    """From 32 MiB on the output is written past the caches: rows begin and end inside a cache line, any threads."""
    inputs = compensation_inputs(size, batch=1, channels=16, dtype=dtype)
    assert inputs["features"].nbytes >= 32 * 2**20
    expected = reference.global_compensation(**inputs)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(functional.global_compensation(**inputs))
    torch.set_num_threads(2)
    for outputs in results:
        for output, first, right in zip(outputs, results[0], expected, strict=True):
            assert torch.equal(output, first)
            torch.testing.assert_close(output, right)


@pytest.mark.parametrize(("maker", "name", "sizes", "settings"), OPS)
def test_each_gradient_alone(request, cpp_backend, maker, name, sizes, settings):
    """Only what is asked for is computed, and it does not depend on what else is asked for."""
    inputs = request.getfixturevalue(maker)(**sizes, **settings, dtype=torch.float32)
    op = getattr(functional, name)
    every = with_gradients(op, inputs, settings)
    number = len(every) - len(inputs)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(output.shape, generator=generator) for output in every[:number]]
    for index, wanted in enumerate(inputs):
        one = {key: tensor.detach().clone().requires_grad_(key == wanted) for key, tensor in inputs.items()}
        (gradient,) = torch.autograd.grad(op(*arguments(one), **settings), one[wanted], incoming)
        assert torch.equal(gradient, every[number + index]), wanted


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoiled", ["features", "coarse", "feature_gate", "coarse_gate"])
@pytest.mark.parametrize("spatial", [(6, 10), (4, 6, 10)])
def test_broken_numbers_of_compensation(compensation_inputs, cpp_backend, spatial, spoiled, value):
    inputs = compensation_inputs(spatial, dtype=torch.float32)
    for place in ((0, 0), (1, 2)):
        at = place if inputs[spoiled].dim() == 2 else (*place, *(0 if place == (0, 0) else -1 for _ in spatial))
        inputs[spoiled][at] = value
    assert_same_numbers(functional.global_compensation(**inputs), reference.global_compensation(**inputs))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "spoiled", ["x", "keys", "values", "query_weight", "position_bias", "output_weight", "score_context", "score_bias"]
)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_broken_numbers_of_attention(attention_inputs, cpp_backend, spoiled, value, threshold):
    inputs = attention_inputs((8, 12), 4, dtype=torch.float32)
    flat = inputs[spoiled].view(-1)
    flat[0] = value
    settings = {"patch_size": 4, "threshold": threshold}
    assert_same_numbers(
        functional.patch_cross_attention(*arguments(inputs), **settings),
        reference.patch_cross_attention(*arguments(inputs), **settings),
    )


def assert_same_numbers(outputs, expected):
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance(torch.float32), equal_nan=True)


@pytest.mark.parametrize("needs", [False, True])
def test_opcheck(compensation_inputs, attention_inputs, needs):
    compensation = list(compensation_inputs((6, 8), dtype=torch.float32).values())
    attention = list(attention_inputs((4, 8), 4, dtype=torch.float32).values())
    for tensor in (*compensation, *attention):
        tensor.requires_grad_(needs)
    scales = [[one, one[:1]] for one in compensation[:4]] + [compensation[4:] * 2]
    torch.library.opcheck(registered._compensate, (*scales, 1e-6, "cpp"))
    torch.library.opcheck(registered._attend, (*attention[:3], attention[3:], 4, 0.0, "cpp"))


def test_opcheck_of_the_backwards(compensation_inputs, attention_inputs):
    compensation = list(compensation_inputs((6, 8), dtype=torch.float32).values())
    outputs = list(reference.global_compensation(*compensation))
    arguments = (outputs, *([one] for one in compensation), 1e-6, "cpp", [True, False, True, True, True])
    torch.library.opcheck(registered._compensate_backward, arguments)
    attention = list(attention_inputs((4, 8), 4, dtype=torch.float32).values())
    outputs = reference.patch_cross_attention(*grouped(attention), 4)
    torch.library.opcheck(
        registered._attend_backward, (*outputs, *attention[:3], attention[3:], 4, 0.0, "cpp", [True, False] * 6)
    )


def small_network():
    model = awake(GRCSF(2, 1, 1, features=(4, 6, 8), patch_size=4, residual_channels=4, rcu_levels=(0, 1)))
    return model, torch.randn(2, 1, 21, 30), torch.rand(2, 2, 21, 30)


@pytest.mark.slow
def test_network_compiles_without_a_break(cpp_backend):
    """Forward and backward; the ops stay whole, the rest is traced."""
    model, image, maps = small_network()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(image, maps)
    torch.testing.assert_close(logits, model(image, maps), atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    traced = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(image, maps).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(traced[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_network_can_be_exported(cpp_backend):
    model, image, maps = small_network()
    program = torch.export.export(model.eval(), (image, maps))
    names = {str(node.target) for node in program.graph.nodes}
    assert "grcsf_fast.multiscale_compensation.default" in names
    assert "grcsf_fast.patch_cross_attention.default" in names
    torch.testing.assert_close(program.module()(image, maps), model(image, maps))


def test_auto_takes_the_kernels_for_the_dtypes_they_have():
    assert select_backend(torch.zeros(1)) == "cpp"
    assert select_backend(torch.zeros(1, dtype=torch.bfloat16)) == "cpp"
    assert select_backend(torch.zeros(1, dtype=torch.float16)) == "reference"
    assert select_backend(torch.zeros(1, device="meta")) == "reference"
    with (
        use_backend("cpp"),
        pytest.raises(BackendUnavailableError, match=r"'cpp' serves cpu tensors of .*got one of float16"),
    ):
        select_backend(torch.zeros(1, dtype=torch.float16))


def test_without_the_compiled_module(monkeypatch, compensation_inputs):
    """By name an error, otherwise the reference with one warning, and both say why."""
    monkeypatch.setattr(compiled, "_cpu", None)
    monkeypatch.setattr(compiled, "_import_error", "No module named '_cpu'", raising=False)
    monkeypatch.setattr(backends, "_warned", set())
    assert backend_info()["cpp"]["available"] is False
    with pytest.raises(BackendUnavailableError, match=r"No module named '_cpu'.*C\+\+ compiler"), use_backend("cpp"):
        pass
    inputs = compensation_inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = [functional.global_compensation(**inputs) for _ in range(2)]
    assert len(caught) == 1
    assert "No module named '_cpu'" in str(caught[0].message)
    assert torch.equal(outputs[0][0], reference.global_compensation(**inputs)[0])


def test_the_registered_ops_refuse_what_they_would_misread(compensation_inputs, attention_inputs):
    """They are public through torch.ops, where nothing has checked the arguments."""
    inputs = compensation_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"coarse: expected torch.float32 of shape \(2, 3, 2, 3\).*torch.float64"):
        registered.multiscale_compensation(
            *([one] for one in (inputs | {"coarse": inputs["coarse"].double()}).values()), backend="cpp"
        )
    inputs = attention_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"values: expected .* of shape \(2, 2, 4, 4, 6\)"):
        registered.patch_cross_attention(
            *arguments(inputs | {"values": inputs["values"][..., :2]}), patch_size=2, backend="cpp"
        )


def test_the_registered_ops_refuse_sizes_that_they_would_divide_by(compensation_inputs, attention_inputs):
    scales = [[one] for one in compensation_inputs(dtype=torch.float32).values()]
    for features in (scales[0][0][..., :0], scales[0][0][..., :-1], scales[0][0][:, :0]):
        with pytest.raises(ValueError, match="features: expected a channel and even spatial axes"):
            registered.multiscale_compensation([features], *scales[1:], backend="cpp")
    x, keys, values, weights = grouped(attention_inputs(dtype=torch.float32).values())
    for given, patch in ((x, 0), (x, 3), (x[..., :0], 2)):
        with pytest.raises(ValueError, match="patch_size: expected a divisor of every axis"):
            cpp.rcu_forward(given, keys, values, weights, patch, 0.0)
    weights = weights._replace(query_weight=weights.query_weight[:, :0])
    with pytest.raises(ValueError, match="query_weight: expected no axis of 0"):
        registered.patch_cross_attention(x, keys, values, weights, 2, backend="cpp")


def test_the_registered_ops_refuse_what_there_is_not(compensation_inputs):
    """A dtype that the kernels lack, and a backend."""
    scales = [[one] for one in compensation_inputs(dtype=torch.float32).values()]
    with pytest.raises(ArgumentError, match=r"^backend: expected one of 'cpp', 'triton', got 'foo'$"):
        registered.multiscale_compensation(*scales, backend="foo")
    half = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    for run in (registered.pool, lambda x: cpp.normalize_activate(x, *torch.ones(2, 1), 1e-5, 0.01)):
        with pytest.raises(ArgumentTypeError, match=r"expected tensors of float32, .* got torch.float16$"):
            run(half)


def test_tensors_without_numbers_are_refused():
    """Past the ops, which know the shapes of such results; their address is that of nothing."""
    with FakeTensorMode():
        x = torch.ones(1, 1, 2, 2)
        assert registered.pool(x).shape == (1, 1, 1, 1)
        with pytest.raises(ArgumentTypeError, match=r"^x: expected a tensor that has numbers, got one of Fake"):
            cpp.pool(x)


@pytest.mark.parametrize(("channels", "most"), [(1, 0.56), (2, 1.0)])
def test_gradients_of_almost_parallel_features(monkeypatch, channels, most):
    """Of the residual alone, where the terms of a gradient cancel: the mean error beside that of the reference.

    Multiplied before they are subtracted it is above the bound at one channel.
    """
    inputs = {
        "features": torch.rand(40, channels, 16, 24) + 1,
        "coarse": torch.rand(40, channels, 8, 12) + 1,
        "feature_gate": torch.rand(40, channels) + 0.5,
        "coarse_gate": torch.rand(40, channels) + 0.5,
        "strength": torch.zeros(channels),
    }
    incoming = torch.randn(40, 1, 16, 24)

    def gradients(op, dtype):
        given = [one.to(dtype).requires_grad_() for one in inputs.values()]
        return torch.autograd.grad(op(*given)[1], given[:2], incoming.to(dtype))

    exact = gradients(reference.global_compensation, torch.float64)

    def errors(op):
        found = gradients(op, torch.float32)
        return torch.stack([(one - other).abs().mean() for one, other in zip(found, exact, strict=True)])

    expected = errors(reference.global_compensation)
    for name in cpp.instruction_sets():
        monkeypatch.setenv("GRCSF_CPU_ISA", name)
        with use_backend("cpp"):
            found = errors(functional.global_compensation) / expected
        assert found.max() < most, name


def test_programs_that_were_moved_or_lack_the_kernels(monkeypatch, compensation_inputs):
    """The backend in an exported program is that of the device it was exported on."""
    inputs = [[tensor] for tensor in compensation_inputs(dtype=torch.float32).values()]
    expected = registered.multiscale_compensation(*inputs, backend="cpp")[0]
    if triton.problem() is not None:
        for one, other in zip(registered.multiscale_compensation(*inputs, backend="triton")[0], expected, strict=True):
            assert torch.equal(one, other)
    monkeypatch.setattr(compiled, "_cpu", None)
    monkeypatch.setattr(compiled, "_import_error", "No module named '_cpu'", raising=False)
    with pytest.raises(RuntimeError, match="no kernels on 'cpu' here: the compiled kernels cannot be imported"):
        registered.multiscale_compensation(*inputs, backend="cpp")


def test_unknown_instruction_set(monkeypatch, compensation_inputs, cpp_backend):
    monkeypatch.setenv("GRCSF_CPU_ISA", "sse9")
    with pytest.raises(ArgumentError, match=r"GRCSF_CPU_ISA: expected one of \['baseline'.*got 'sse9'"):
        functional.global_compensation(**compensation_inputs())
    monkeypatch.setenv("GRCSF_CPU_ISA", "")
    assert compiled.instruction_sets()[compiled._instruction_set()] == compiled.instruction_sets()[-1]


def test_instructions_that_are_compiled_in_are_asked_of_the_processor():
    """On one that lacks them the kernels would be killed."""
    root = Path(__file__).parents[2]
    flags = re.findall(r'"-m(\w+)"', re.search(r"\nAVX2 = .*", (root / "setup.py").read_text()).group())
    source = (root / "kernels/cpu/bindings.cpp").read_text()
    asked = re.findall(r'supports\("(\w+)"\)', re.search("const bool avx2 = [^;]*;", source).group())
    assert sorted(flags) == sorted(asked)


def test_a_build_says_whose_threads_it_has(monkeypatch):
    for openmp, said in ((True, "; threads of OpenMP"), (False, "; threads of their own, without OpenMP")):
        monkeypatch.setattr(compiled, "_cpu", SimpleNamespace(openmp=openmp))
        assert compiled.description().endswith(said)


@pytest.mark.parametrize(("spatial", "patch_size"), [((24, 40), 8), ((8, 12, 4), 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_that_are_halves_of_one_tensor(attention_inputs, cpp_backend, spatial, patch_size, dtype):
    """As the RCU has them, map by map: read where they are, with the bits of copies."""
    inputs = attention_inputs(spatial=spatial, patch_size=patch_size, dtype=dtype)
    batch, maps, residual = inputs["keys"].shape[:3]
    both = torch.randn(maps, batch, 2 * residual, *spatial).to(dtype)
    keys, values = both.transpose(0, 1).chunk(2, dim=2)
    assert all(one is other for one, other in zip(cpp._map_by_map(keys, values), (keys, values), strict=True))
    found, expected = (
        with_gradients(
            functional.patch_cross_attention, inputs | {"keys": one, "values": other}, {"patch_size": patch_size}
        )
        for one, other in ((keys, values), (keys.contiguous(), values.contiguous()))
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    # Any other strides go by a copy.
    turned = keys.transpose(-1, -2).contiguous().transpose(-1, -2)
    for pair in ((turned, turned), (keys, values.contiguous()), (keys[:0], values[:0])):
        assert all(one.is_contiguous() for one in cpp._map_by_map(*pair))
