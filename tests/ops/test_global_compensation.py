"""Op 1 of every backend against loops, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from every_backend import DTYPES, skip_unserved
from loops import as_numpy, assert_matches, gated, loop_compensation
from tolerances import tolerance
from torch.autograd import gradcheck, gradgradcheck

COMPENSATION_SIZES = [(2, 2), (4, 6), (14, 2), (10, 26), (2, 2, 2), (2, 4, 6), (6, 2, 10)]


class TestGlobalCompensation:
    @pytest.mark.parametrize("batch", [0, 1, 2])
    @pytest.mark.parametrize("channels", [1, 3, 17])
    @pytest.mark.parametrize("spatial", COMPENSATION_SIZES)
    def test_matches_loop(self, ops, compensation_inputs, spatial, channels, batch):
        inputs = compensation_inputs(spatial, batch, channels)
        compensated, residual = ops.global_compensation(**inputs)
        expected_compensated, expected_residual = loop_compensation(**as_numpy(inputs))
        assert compensated.dtype == residual.dtype == inputs["features"].dtype
        assert_matches(compensated, expected_compensated)
        assert_matches(residual, expected_residual)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("spatial", [(10, 26), (6, 2, 10)])
    def test_every_dtype_against_float64(self, ops, where, compensation_inputs, spatial, dtype):
        skip_unserved(ops, where, dtype)
        inputs = compensation_inputs(spatial, channels=17, dtype=dtype)
        compensated, residual = ops.global_compensation(**inputs)
        expected_compensated, expected_residual = loop_compensation(**as_numpy(inputs))
        assert compensated.dtype == residual.dtype == dtype
        assert_matches(compensated, expected_compensated)
        assert_matches(residual, expected_residual)

    @pytest.mark.parametrize("eps", [1e-6, 0.5, 10.0])
    def test_eps_is_the_floor_of_the_denominator(self, ops, compensation_inputs, eps):
        inputs = compensation_inputs()
        compensated, residual = ops.global_compensation(**inputs, eps=eps)
        expected_compensated, expected_residual = loop_compensation(**as_numpy(inputs), eps=eps)
        assert_matches(compensated, expected_compensated)
        assert_matches(residual, expected_residual)

    def test_residual_of_parallel_and_opposite_features(self, ops, where):
        """0 where the up-sampled features point the same way, 2 where they point the other way."""
        features = torch.ones(1, 4, 4, 4, dtype=where.dtype, device=where.device)
        gate = torch.full((1, 4), 0.3, dtype=where.dtype, device=where.device)
        for sign, expected in ((1.0, 0.0), (-1.0, 2.0)):
            _, residual = ops.global_compensation(features, sign * features[..., ::2, ::2], gate, gate, gate[0])
            torch.testing.assert_close(residual, torch.full_like(residual, expected), **tolerance(where.dtype))

    @pytest.mark.parametrize("spatial", [(4, 2), (2, 4, 2)])
    def test_gradients(self, ops, double, compensation_inputs, spatial):
        inputs = gated(compensation_inputs(spatial))
        assert gradcheck(ops.global_compensation, tuple(inputs.values()))

    @pytest.mark.parametrize("spatial", [(2, 4), (2, 2, 2)])
    def test_second_gradients(self, ops, reference_alone, compensation_inputs, spatial):
        inputs = gated(compensation_inputs(spatial, batch=1, channels=2))
        assert gradgradcheck(ops.global_compensation, tuple(inputs.values()))

    def test_gradients_where_eps_is_in_force(self, ops, double, compensation_inputs):
        inputs = gated(compensation_inputs((4, 2)))
        assert gradcheck(lambda *tensors: ops.global_compensation(*tensors, eps=100.0), tuple(inputs.values()))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("zeros", [("features",), ("coarse",), ("feature_gate",), ("features", "coarse")])
    @pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 2)])
    def test_zeros_are_finite(self, ops, where, compensation_inputs, spatial, zeros, dtype):
        """A pixel without a direction has residual 1 and finite gradients."""
        skip_unserved(ops, where, dtype)
        inputs = compensation_inputs(spatial, dtype=dtype)
        inputs = gated(inputs | {name: torch.zeros_like(inputs[name]) for name in zeros})
        compensated, residual = ops.global_compensation(**inputs)
        assert torch.equal(residual, torch.ones_like(residual))
        assert_matches(compensated, loop_compensation(**as_numpy(inputs))[0])
        (compensated.sum() + residual.sum()).backward()
        for name, tensor in inputs.items():
            assert tensor.grad.isfinite().all(), name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_zeros_are_finite_under_a_tiny_eps(self, ops, where, compensation_inputs, dtype):
        """Any eps above 0 is a floor, one whose square float32 cannot hold too."""
        skip_unserved(ops, where, dtype)
        inputs = compensation_inputs(dtype=dtype)
        inputs = gated(inputs | {"features": torch.zeros_like(inputs["features"])})
        compensated, residual = ops.global_compensation(**inputs, eps=1e-30)
        assert torch.equal(residual, torch.ones_like(residual))
        assert_matches(compensated, loop_compensation(**as_numpy(inputs), eps=1e-30)[0])
        compensated.sum().backward()
        assert inputs["features"].grad.isfinite().all()

    @pytest.mark.parametrize("spatial", [(6, 10), (4, 6, 10)])
    def test_nan_feature_stays_in_its_pixel(self, ops, compensation_inputs, spatial):
        inputs = compensation_inputs(spatial)
        clean, clean_residual = ops.global_compensation(**inputs)
        pixel = (1, *[1] * (len(spatial) - 1))
        inputs["features"][(1, 2, *pixel)] = math.nan
        compensated, residual = ops.global_compensation(**inputs)
        spoiled = torch.zeros_like(residual, dtype=torch.bool)
        spoiled[(1, 0, *pixel)] = True
        assert torch.equal(residual.isnan(), spoiled)
        assert torch.equal(compensated.isnan(), spoiled.expand_as(compensated))
        torch.testing.assert_close(residual[~spoiled], clean_residual[~spoiled], atol=0, rtol=0)
        untouched = ~spoiled.expand_as(compensated)
        torch.testing.assert_close(compensated[untouched], clean[untouched], atol=0, rtol=0)

    def test_nan_coarse_pixel_stays_in_its_footprint(self, ops, compensation_inputs):
        """One coarse pixel reaches the 4 by 4 pixels that are interpolated from it."""
        inputs = compensation_inputs((14, 14))
        inputs["coarse"][0, 1, 3, 2] = math.nan
        compensated, residual = ops.global_compensation(**inputs)
        spoiled = torch.zeros_like(residual, dtype=torch.bool)
        spoiled[0, 0, 5:9, 3:7] = True
        assert torch.equal(residual.isnan(), spoiled)
        assert torch.equal(compensated.isnan(), spoiled.expand_as(compensated))
