"""The networks through torch's exporters and compiler: one graph, results of the network itself."""

from __future__ import annotations

import warnings

import onnxruntime
import pytest
import torch
from small import autoencoder, network
from torch import Tensor, nn

from grcsf_fast import GRCSF, backend_info, residual_maps, use_backend

SIZES = {2: (9, 14), 3: (5, 9, 6)}
BACKENDS = [name for name in ("cpp", "reference") if backend_info()[name]["available"]]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Of torch's own making.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def with_autoencoder(spatial_dims: int, **settings: object) -> GRCSF:
    return network(spatial_dims, mae=autoencoder(spatial_dims), **settings)


def images(spatial_dims: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 1, *SIZES[spatial_dims])


EVERY = [
    pytest.param(backend, dims, strict, marks=() if (backend, dims, strict) == quick else pytest.mark.slow)
    for quick in [(BACKENDS[-1], 2, False)]
    for backend in BACKENDS
    for dims in (2, 3)
    for strict in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dims", "strict"), EVERY)
def test_export_with_the_autoencoder_for_any_batch(backend, dims, strict):
    """The masks are constants of the program, so it asks for no generator and for no size that depends on values."""
    model = with_autoencoder(dims)
    with use_backend(backend), torch.no_grad():
        program = torch.export.export(
            model, (images(dims),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
        )
        for batch in (2, 5):
            one = images(dims, batch)
            torch.testing.assert_close(program.module()(one), model(one), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
def test_onnx(dims, tmp_path):
    model, one = with_autoencoder(dims), images(dims)
    with use_backend("reference"), torch.no_grad():
        program = torch.onnx.export(model, (one,), dynamo=True)
        expected = model(one)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: one.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [BACKENDS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in BACKENDS[1:])])
def test_one_graph_with_the_autoencoder(backend, dims, training):
    model, one = with_autoencoder(dims).train(training), images(dims)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with use_backend(backend):
        torch.testing.assert_close(compiled(one), model(one), **CLOSE)
    assert all(module.training == training for module in model.modules())


@pytest.mark.slow
def test_one_graph_of_residual_maps():
    mae, one = autoencoder(), images(2)
    compiled = torch.compile(residual_maps, fullgraph=True, backend="eager")
    for settings in ({"rounds": 2, "seed": 3}, {"mask_ratios": (0.25, 0.5)}, {"batch_size": 2}):
        torch.testing.assert_close(compiled(one, mae, **settings), residual_maps(one, mae, **settings), **CLOSE)


def gradients(model: nn.Module, run, one: Tensor, maps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = run(one, maps)
    logits.square().mean().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# Three symbolic axes behind a strided Conv3d are beyond torch 2.13's inductor, whatever the network (two layers will
# do): "Invalid ranges [0:-1]". So a second level in 3-D is tried up to inductor.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "levels", "maps", "compiler"),
    [(2, (0, 1), 2, "inductor"), (2, (0, 1), 3, "inductor"), (3, (0,), 2, "inductor"), (3, (0, 1), 2, "aot_eager")],
)
def test_training_with_sizes_that_change(dims, levels, maps, compiler):
    """Several levels share the residual maps, whose sizes are symbols to the compiler."""
    model = network(dims, rcu_levels=levels, mask_ratios=(0.5, 0.75, 0.9)[:maps]).train()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=compiler)
    for spatial in ((16, 24, 8)[:dims], (24, 16, 16)[:dims]):
        one, given = torch.randn(2, 1, *spatial), torch.rand(2, maps, *spatial)
        expected, right = gradients(model, model, one, given)
        found, others = gradients(model, compiled, one, given)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        for name, gradient in right.items():
            # A bias before an instance norm has a gradient of 0, and rounding.
            torch.testing.assert_close(others[name], gradient, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_sizes_that_change_in_one_graph():
    """The quick part of it: the graph alone, without the compiler's code."""
    model = network(2).train()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")
    for spatial in ((16, 24), (24, 16), (9, 13)):
        one, given = torch.randn(2, 1, *spatial), torch.rand(2, 2, *spatial)
        expected, right = gradients(model, model, one, given)
        found, others = gradients(model, compiled, one, given)
        torch.testing.assert_close(found, expected, **CLOSE)
        for name, gradient in right.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
