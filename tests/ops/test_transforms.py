"""Every way that torch has of differentiating and batching, through every op: the reference's numbers, or an error.

By itself the package chooses an implementation that gives the right numbers; with kernels asked for by name, or reached
past the choice, it raises and names the reference.
"""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from calling import OURS, PLAIN, arguments
from tolerances import tolerance
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from grcsf_fast import functional, use_backend
from grcsf_fast.errors import ArgumentError
from grcsf_fast.ops import backends, cpp, registered

pytestmark = [
    pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built"),
    pytest.mark.filterwarnings("ignore:.*'reference' serves"),
]

REMEDY = r'use_backend\("reference"\)'


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch):
    monkeypatch.delenv("GRCSF_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_warned", set())


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def compensation():
    coarse, gates, strength = numbers(2, 3, 2, 3), torch.rand(2, 2, 3, dtype=torch.float64) + 0.1, numbers(3)
    return numbers(2, 3, 4, 6), lambda ops, x: ops.global_compensation(x, coarse, *gates, strength)[0]


def attention():
    weights = [numbers(2, 2, 4, 3), numbers(2, 2, 4), numbers(2, 4, 4), numbers(2, 2, 3, 4), numbers(3), numbers(5, 3)]
    weights += [numbers(1, 5), numbers(5), numbers()]
    keys, values = numbers(2, 1, 2, 4, 2, 4)
    return numbers(1, 3, 2, 4), lambda ops, x: ops.patch_cross_attention(
        x, keys, values, functional.AttentionWeights(*weights), 2
    )[0]


def normalization():
    weight, bias = numbers(2, 3)
    return numbers(2, 3, 4, 6), lambda ops, x: ops.normalize_activate(x, weight, bias)


def pooling():
    return numbers(2, 3, 4, 6), lambda ops, x: ops.pool(x)


def transformer_attention():
    keys, values = numbers(2, 2, 6, 4)
    return numbers(2, 5, 4), lambda ops, x: ops.attend(x, keys, values, 2)


def gelu():
    weight, bias = numbers(7, 4), numbers(7)
    return numbers(2, 5, 4), lambda ops, x: ops.linear_gelu(x, weight, bias)


UNITS = [compensation, attention]
STAGES = [normalization, pooling, transformer_attention, gelu]


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def forward_mode_beside_gradients(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x.clone().requires_grad_(), x.cos()))).tangent.detach()


def batch_of_gradients(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, torch.stack([y.detach(), y.detach().cos()]), is_grads_batched=True)[0]


def second(f, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def second_by_the_incoming(f, x):
    x, y = x.clone().requires_grad_(), f(x).detach()
    incoming = y.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, incoming, create_graph=True)
    return torch.autograd.grad(first.square().sum(), incoming)[0]


def total(f):
    return lambda x: f(x).square().sum()


# Reverse mode once, and forward passes: the kernels give the right numbers or the choice is not theirs.
FOLLOWED = {
    "forward_ad": forward_mode,
    "forward_ad, requires_grad": forward_mode_beside_gradients,
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "grad": lambda f, x: grad(total(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](f(x).detach().cos())[0],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x.cos()])),
    "torch.vmap along the last axis": lambda f, x: torch.vmap(f, in_dims=-1)(torch.stack([x, x.cos()], -1)),
    "vmap of grad": lambda f, x: vmap(grad(total(f)))(torch.stack([x, x.cos()])),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(torch.stack([x, x.cos()])[None]),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "jacobian, forward": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
}
# Decided only after the forward was done.
REFUSED = {
    "second": second,
    "second by the incoming gradient": second_by_the_incoming,
    "is_grads_batched": batch_of_gradients,
    "jacobian, vectorized": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "autograd.functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos())[1],
    "autograd.functional.hvp": lambda f, x: torch.autograd.functional.hvp(total(f), x, x.cos())[1],
    "autograd.functional.hessian": lambda f, x: torch.autograd.functional.hessian(total(f), x),
}


@pytest.mark.parametrize("way", FOLLOWED)
@pytest.mark.parametrize("case", UNITS + STAGES)
def test_followed(case, way):
    if (case, way) == (pooling, "jacobian, forward"):
        pytest.skip("PyTorch's own max_pool2d has no rule for it, and says so")
    x, run = case()
    found = FOLLOWED[way](lambda x: run(OURS, x), x)
    expected = FOLLOWED[way](lambda x: run(PLAIN, x), x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, **tolerance(torch.float64))


@pytest.mark.parametrize("case", UNITS)
def test_hessian_of_torch_func(case):
    x, run = case()
    found, expected = (hessian(total(lambda x, ops=ops: run(ops, x)))(x) for ops in (OURS, PLAIN))
    torch.testing.assert_close(found, expected, **tolerance(torch.float64))


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("case", UNITS)
def test_refused_after_a_forward_of_kernels(case, way):
    x, run = case()
    with pytest.raises(NotImplementedError, match=REMEDY):
        REFUSED[way](lambda x: run(OURS, x), x)
    with use_backend("reference"):
        found = REFUSED[way](lambda x: run(OURS, x), x)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, REFUSED[way](lambda x: run(PLAIN, x), x))


@pytest.mark.parametrize("way", sorted(set(FOLLOWED) - {"jacobian"}))
@pytest.mark.parametrize("case", UNITS)
def test_kernels_asked_for_by_name(case, way):
    """Where the kernels alone may serve, they say that they cannot, or give the reference's numbers (plain vmap)."""
    x, run = case()
    with use_backend("cpp"):
        if "vmap" in way and "grad" not in way:
            found = FOLLOWED[way](lambda x: run(OURS, x), x)
            torch.testing.assert_close(found, FOLLOWED[way](lambda x: run(PLAIN, x), x))
        else:
            with pytest.raises(NotImplementedError, match=REMEDY):
                FOLLOWED[way](lambda x: run(OURS, x), x)


def test_vmap_over_no_samples():
    """What it would give nobody has computed."""
    with pytest.raises(ArgumentError, match=r"^pool: expected a sample or more along the axis .* got 0$"):
        vmap(registered.pool)(torch.ones(0, 1, 2, 4, 4))


def test_one_warning_says_why_the_reference_serves():
    x, run = compensation()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            grad(total(lambda x: run(OURS, x)))(x)
    (warning,) = caught
    assert "'cpp' does not follow a transform of torch.func" in str(warning.message)


def test_a_level_of_forward_mode_without_tangents_is_nothing():
    x, run = compensation()
    with use_backend("cpp"), forward_ad.dual_level():
        torch.testing.assert_close(run(OURS, x), run(PLAIN, x))


STAGE_OPS = [
    (registered.pool, ((2, 3, 4, 6),), ()),
    (registered.pool_with_mean, ((2, 3, 4, 6),), ()),
    (registered.normalize_activate, ((2, 3, 4, 6), (3,), (3,)), (1e-5, 0.01)),
    (registered.attend, ((2, 5, 4), (2, 6, 4), (2, 6, 4)), (2,)),
    (registered.linear_gelu, ((2, 5, 4), (7, 4), (7,)), ()),
    (registered.convolve, ((2, 3, 4, 6), (36, 1, 3, cpp._cpu.conv_panel if cpp._cpu else 1), (2,)), ()),
    (registered.upsample, ((2, 3, 4, 6), (4, 2, 3), (2,)), ()),
]


@pytest.mark.parametrize(("op", "shapes", "settings"), STAGE_OPS)
def test_ops_without_a_backward(op, shapes, settings):
    """Reached past `functional`, as frozen layers and exported programs do."""
    x, *others = (numbers(*shape) for shape in shapes)

    def run(x):
        outputs = op(x, *others, *settings)
        return outputs if isinstance(outputs, Tensor) else torch.cat(outputs)

    with pytest.raises(NotImplementedError, match=REMEDY):
        run(x.clone().requires_grad_()).sum().backward()
    for way in ("forward_ad", "jvp", "grad", "vjp", "jacrev", "jacfwd", "vmap of grad"):
        with pytest.raises(NotImplementedError, match=REMEDY):
            FOLLOWED[way](run, x)
    batched = vmap(run)(torch.stack([x, x.cos()]))
    assert torch.equal(batched, torch.stack([run(x), run(x.cos())]))
    with torch.no_grad():
        assert torch.equal(run(x.clone().requires_grad_()), run(x))


def test_tangents_of_incoming_gradients_are_not_dropped():
    """Forward over reverse: only the backward sees the tangent."""
    x, run = compensation()
    x = x.requires_grad_()
    y = run(OURS, x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=REMEDY):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_per_sample_gradients():
    weight = numbers(3).requires_grad_()
    x, run = compensation()

    def loss(parameters, x):
        return run(OURS, x * parameters[:, None, None]).square().sum()

    batch = torch.stack([x, x.cos()])
    found = vmap(grad(loss), in_dims=(None, 0))(weight.detach(), batch)
    for sample, gradient in zip(batch, found, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(weight, sample), weight)[0])


@pytest.mark.parametrize("case", UNITS)
def test_gradcheck_in_all_its_ways(case):
    x, run = case()
    x = x.requires_grad_()

    def call(x):
        return run(OURS, x)

    assert torch.autograd.gradcheck(call, (x,), check_forward_ad=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="reference"):
        torch.autograd.gradcheck(call, (x,), check_batched_grad=True)
    with pytest.raises(NotImplementedError, match=REMEDY):
        torch.autograd.gradgradcheck(call, (x,))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, (x,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, (x,))


def gradients_of(run, x):
    x = x.detach().clone().requires_grad_()
    run(x).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", UNITS + STAGES)
def test_checkpoint(case, reentrant):
    x, run = case()
    found = gradients_of(
        lambda x: torch.utils.checkpoint.checkpoint(lambda x: run(OURS, x), x, use_reentrant=reentrant), x
    )
    torch.testing.assert_close(found, gradients_of(lambda x: run(PLAIN, x), x))


@pytest.mark.parametrize("case", UNITS)
def test_checkpoint_on_a_backend_of_its_own(case, monkeypatch):
    """Backward outside the block, which the repeated forward is told of, as the docstring of ``use_backend`` says."""
    x, run = case()
    x.requires_grad_()
    selected, select = [], backends.select_backend

    def noted(tensor):
        selected.append(select(tensor))
        return selected[-1]

    monkeypatch.setattr(backends, "select_backend", noted)
    with use_backend("reference"):
        y = torch.utils.checkpoint.checkpoint(
            lambda x: run(OURS, x), x, use_reentrant=False,
            context_fn=lambda: (use_backend("reference"), use_backend("reference")),
        )  # fmt: skip
    y.square().sum().backward()
    assert selected == ["reference"] * 2
    torch.testing.assert_close(x.grad, gradients_of(lambda x: run(PLAIN, x), x))


@pytest.mark.parametrize("case", UNITS)
def test_hooks_of_saved_tensors(case):
    """Packed as bytes and read again: nothing but their values counts."""
    x, run = case()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        found = gradients_of(lambda x: run(OURS, x), x)
    torch.testing.assert_close(found, gradients_of(lambda x: run(PLAIN, x), x))


@pytest.mark.parametrize("case", UNITS)
def test_hooks_of_tensors(case):
    x, run = case()
    x = x.requires_grad_()
    y = run(OURS, x)
    y.register_hook(lambda gradient: 2 * gradient)
    x.register_hook(lambda gradient: -gradient)
    y.sum().backward()
    expected = x.detach().clone().requires_grad_()
    run(PLAIN, expected).sum().mul(-2).backward()
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.parametrize("case", UNITS + STAGES)
def test_inference_mode(case):
    x, run = case()
    with torch.inference_mode():
        found = run(OURS, x)
    torch.testing.assert_close(found, run(PLAIN, x))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", UNITS + STAGES)
def test_autocast(case, dtype, gradients):
    """The same dtype from every backend, with gradients and without; numbers within half precision."""
    x, run = case()
    x = x.to(dtype).requires_grad_(gradients)

    def lowered(ops, x):
        class Lowered:
            def __getattr__(self, name):
                return lambda *args: getattr(ops, name)(
                    *torch.utils._pytree.tree_map(lambda a: a.to(dtype) if isinstance(a, torch.Tensor) else a, args)
                )

        return run(Lowered(), x)

    with torch.autocast("cpu", torch.bfloat16):
        found, expected = lowered(OURS, x), lowered(PLAIN, x)
    assert found.dtype == expected.dtype
    size = float(expected.detach().abs().max())
    # Twice that of one result: both are rounded on their way, and where differs.
    torch.testing.assert_close(found.double() / size, expected.double() / size, atol=1.6e-2, rtol=1.6e-2)


def test_score_under_autocast_is_not_narrower(attention_inputs):
    inputs = attention_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("cpp", "reference"):
            with use_backend(backend):
                assert functional.patch_cross_attention(*arguments(inputs), patch_size=2)[1].dtype == torch.float32


@pytest.mark.parametrize("case", UNITS)
def test_backward_in_another_thread(case):
    """It runs on the backend of the forward, whatever is asked for where it runs."""
    x, run = case()
    expected = gradients_of(lambda x: run(PLAIN, x), x)
    x = x.requires_grad_()
    with use_backend("cpp"):
        y = run(OURS, x).square().sum()
    done = []

    def backward():
        with use_backend("reference"):
            y.backward()
        done.append(x.grad)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    torch.testing.assert_close(done[0], expected)


@pytest.mark.parametrize("case", UNITS)
def test_compiled_whole_and_exported(case):
    x, run = case()

    class Module(torch.nn.Module):
        def forward(self, x):
            return run(OURS, x)

    torch._dynamo.reset()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    expected = gradients_of(lambda x: run(PLAIN, x), x)
    torch.testing.assert_close(gradients_of(compiled, x), expected)
    program = torch.export.export(Module(), (x,)).module()
    torch.testing.assert_close(program(x), run(PLAIN, x))
    with pytest.raises(NotImplementedError, match=REMEDY):
        forward_mode(program, x)
    with pytest.raises(NotImplementedError, match=REMEDY):
        grad(total(program))(x)
