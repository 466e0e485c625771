"""Hooks, adapters and reparametrisations: what somebody puts on or around a module takes effect, on each of them."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from small import autoencoder, network
from tolerances import tolerance
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from grcsf_fast import residual_maps
from grcsf_fast.networks.gcu import GlobalCompensationUnit
from grcsf_fast.ops import cpp


def with_autoencoder(spatial_dims: int = 2, **settings: object):
    mae = autoencoder(spatial_dims, depth=2, decoder_depth=2)
    return network(spatial_dims, mae=mae, **settings)


def callable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All but those that only hold others."""
    return {name: one for name, one in model.named_modules() if not isinstance(one, nn.ModuleList | nn.ModuleDict)}


def image(spatial_dims: int = 2) -> Tensor:
    return torch.randn(2, 1, *[9, 14, 6][:spatial_dims])


@pytest.mark.parametrize("downsample", ["conv", "max"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("form", ["plain", "training", "lowered", "fused", "fused lowered"])
@pytest.mark.parametrize("kind", ["before", "after"])
def test_every_module_is_called(spatial_dims, form, kind, downsample):
    model = with_autoencoder(spatial_dims, downsample=downsample, features=(8, 10, 12))
    if "fused" in form or "lowered" in form:
        if "fused" in form and cpp.problem() is not None:
            pytest.skip("the C++ kernels are not built")
        dtype = torch.bfloat16 if "lowered" in form else torch.float32
        model = model.optimized_for_inference(dtype, fused="fused" in form)
    model.train(form == "training")
    called: set[str] = set()
    for name, module in callable_modules(model).items():
        if kind == "before":
            module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        else:
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    maps = residual_maps(image(spatial_dims), model.mae) if "lowered" in form else None
    with torch.set_grad_enabled(form == "training"):
        model(image(spatial_dims), maps)
    assert called == set(callable_modules(model))


@pytest.mark.parametrize("gradients", [pytest.param(True, marks=pytest.mark.slow), False])
def test_one_hook_is_enough(gradients):
    """Also where no other module has one."""
    for name in callable_modules(with_autoencoder()):
        model = with_autoencoder()
        calls = []
        model.get_submodule(name).register_forward_hook(lambda *_, calls=calls: calls.append(None))
        with torch.set_grad_enabled(gradients):
            model(image())
        assert calls, name


def test_global_hooks():
    model = with_autoencoder()
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        with torch.no_grad():
            model(image())
    finally:
        handle.remove()
    assert set(callable_modules(model).values()) == set(called)


@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_change_nothing_by_themselves(gradients):
    """Kernels and modules agree to rounding, whichever runs."""
    model = with_autoencoder()
    one = image()
    with torch.set_grad_enabled(gradients):
        expected, maps = model(one, return_maps=True)
        for module in callable_modules(model).values():
            module.register_forward_hook(lambda *_: None)
        found, found_maps = model(one, return_maps=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_maps.residual_maps, maps.residual_maps, atol=1e-5, rtol=1e-5)


def leaf_linears(model: nn.Module) -> list[str]:
    return [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]


class LowRank(nn.Module):
    """A linear layer and a correction beside it, as adapters have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        whole = copy.deepcopy(self.base)
        whole.weight += self.up.weight @ self.down.weight
        return whole


@torch.no_grad()
def test_adapters():
    """Each layer with a correction beside it gives what the corrected weights give."""
    for name in leaf_linears(with_autoencoder()):
        model, one = with_autoencoder(), image()
        before = residual_maps(one, model.mae)
        adapter = LowRank(model.get_submodule(name))
        model.set_submodule(name, adapter)
        found, maps = model(one, return_maps=True)
        model.set_submodule(name, adapter.merged())
        expected, maps_expected = model(one, return_maps=True)
        torch.testing.assert_close(found, expected, **tolerance(torch.float32))
        torch.testing.assert_close(maps.residual_maps, maps_expected.residual_maps, **tolerance(torch.float32))
        assert torch.allclose(maps.residual_maps, before) != name.startswith("mae"), name


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@torch.no_grad()
@pytest.mark.parametrize(
    "way",
    [
        *("parametrize", "forward"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("pre-hook", "prune", "subclass", "functional")),
    ],
)
def test_other_weights(way):
    """Doubled (or pruned) weights have the effect of weights that were written so, in each layer."""

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, 2 * self.weight, self.bias)

    for name in leaf_linears(with_autoencoder()):
        model, one = with_autoencoder(), image()
        written = copy.deepcopy(model)
        layer = model.get_submodule(name)
        written.get_submodule(name).weight.mul_(0 if way == "prune" else 2)
        run = model
        if way == "parametrize":
            parametrize.register_parametrization(layer, "weight", Doubled())
        elif way == "pre-hook":
            weight = layer.weight
            del layer._parameters["weight"]
            layer.register_forward_pre_hook(lambda module, _, weight=weight: setattr(module, "weight", 2 * weight))
            layer.weight = weight.data
        elif way == "prune":
            prune.custom_from_mask(layer, "weight", torch.zeros_like(layer.weight))
        elif way == "subclass":
            layer.__class__ = Twice
        elif way == "forward":
            layer.forward = lambda x, layer=layer: nn.functional.linear(x, 2 * layer.weight, layer.bias)
        else:
            run = partial(torch.func.functional_call, model, {f"{name}.weight": 2 * layer.weight})
        torch.testing.assert_close(run(one), written(one), atol=1e-5, rtol=1e-5)


def test_weight_norm_trains():
    """Gradients reach magnitude and direction of a normalised layer of the autoencoder."""
    mae = autoencoder(decoder_depth=2)
    for block in (*mae.blocks, *mae.decoder_blocks):
        for layer in (block.qkv if block in [*mae.blocks] else block.key_value, block.mlp[0]):
            parametrizations.weight_norm(layer)
    mae.loss(torch.randn(1, 1, 8, 8), torch.tensor([[0, 3]])).backward()
    gradients = {name: p.grad for name, p in mae.named_parameters() if "parametrizations" in name}
    assert len(gradients) == 12
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name


@torch.no_grad()
def test_dynamic_quantisation():
    """Eight-bit layers run and stay near the layers they were made from."""
    model, one = with_autoencoder(), image()
    expected = residual_maps(one, model.mae)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mae = torch.ao.quantization.quantize_dynamic(model.mae, {nn.Linear}, dtype=torch.qint8)
        found = residual_maps(one, mae)
    assert not torch.equal(found, expected)
    # Not the table's bound, which is of floating point: these weights are 8-bit integers.
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    model.mae = mae
    torch.testing.assert_close(model(one), model(one, found))


@torch.no_grad()
def test_other_activation():
    mae, one = autoencoder(), image()
    expected = residual_maps(one, mae)
    for block in (*mae.blocks, *mae.decoder_blocks):
        block.mlp[1] = nn.GELU(approximate="tanh")
    assert not torch.equal(residual_maps(one, mae), expected)
    # Not the table's bound: tanh approximates GELU, here and below.
    torch.testing.assert_close(residual_maps(one, mae), expected, atol=2e-4, rtol=2e-4)
    for block in (*mae.blocks, *mae.decoder_blocks):
        block.mlp = nn.Sequential(*block.mlp, nn.Dropout())
    torch.testing.assert_close(residual_maps(one, mae.train()), expected, atol=2e-4, rtol=2e-4)
    assert all(module.training for module in mae.modules())


def test_training_modes_come_back_one_by_one():
    mae = autoencoder().train()
    mae.blocks[0].eval()
    before = [module.training for module in mae.modules()]
    residual_maps(image(), mae)
    assert [module.training for module in mae.modules()] == before


@torch.no_grad()
def test_a_unit_is_seen_whole():
    """A hook on a global compensation unit gets what goes to the skip connection, and may replace it."""
    model, one = with_autoencoder(), image()
    seen = []
    handle = model.gcu[1].register_forward_hook(lambda module, inputs, outputs: seen.append((inputs, outputs)))
    expected, maps = model(one, return_maps=True)
    (features, coarse), (compensated, residual) = seen[0]
    assert coarse.shape[2:] == tuple(size // 2 for size in features.shape[2:])
    assert compensated.shape == features.shape
    assert torch.equal(
        residual[..., : maps.gcu_residuals[1].shape[2], : maps.gcu_residuals[1].shape[3]], maps.gcu_residuals[1]
    )
    handle.remove()
    torch.testing.assert_close(model(one), expected)
    model.gcu[1].register_forward_hook(lambda module, inputs, outputs: (inputs[0], outputs[1]))
    assert not torch.allclose(model(one), expected)

    class Off(GlobalCompensationUnit):
        def forward(self, features: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
            return features, features[:, :1] * 0

    replaced = model(one)
    model.gcu[1] = Off(6)
    torch.testing.assert_close(model(one), replaced)
