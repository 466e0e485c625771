"""Op 2 of every backend against loops, and its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from calling import arguments, grouped
from every_backend import DTYPES, skip_unserved, skip_unserved_sizes
from loops import ATTENTION_SIZES, as_numpy, assert_matches, gated, loop_attention
from torch.autograd import gradcheck


class TestPatchCrossAttention:
    @pytest.mark.parametrize("batch", [0, 1, 2])
    @pytest.mark.parametrize("maps", [1, 2, 3])
    @pytest.mark.parametrize(("patch_size", "spatial"), ATTENTION_SIZES)
    def test_matches_loop(self, ops, where, attention_inputs, patch_size, spatial, maps, batch):
        inputs = attention_inputs(spatial, patch_size, batch, maps=maps)
        skip_unserved_sizes(ops, where, inputs, patch_size)
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=patch_size)
        expected_out, expected_score, _ = loop_attention(**as_numpy(inputs), patch_size=patch_size)
        assert out.dtype == score.dtype == inputs["x"].dtype
        assert_matches(out, expected_out)
        assert_matches(score, expected_score)

    @pytest.mark.parametrize("sizes", [{"channels": 1}, {"heads": 1}, {"heads": 3}, {"residual_channels": 1}])
    def test_matches_loop_over_channels_and_heads(self, ops, attention_inputs, sizes):
        inputs = attention_inputs((4, 6), 2, **sizes)
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        expected_out, expected_score, _ = loop_attention(**as_numpy(inputs), patch_size=2)
        assert_matches(out, expected_out)
        assert_matches(score, expected_score)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("patch_size", "spatial"), [(4, (12, 8)), (7, (7, 14)), (3, (3, 6, 9))])
    def test_every_dtype_against_float64(self, ops, where, attention_inputs, patch_size, spatial, dtype):
        skip_unserved(ops, where, dtype)
        inputs = attention_inputs(spatial, patch_size, channels=17, residual_channels=16, dtype=dtype)
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=patch_size)
        expected_out, expected_score, _ = loop_attention(**as_numpy(inputs), patch_size=patch_size)
        assert out.dtype == dtype
        assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_matches(out, expected_out)
        assert_matches(score, expected_score)

    def test_large_logits(self, ops, attention_inputs):
        """The softmax of logits beyond exp's range is finite: attention to one token."""
        inputs = attention_inputs()
        inputs["keys"] *= 1e4
        out, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        assert_matches(out, loop_attention(**as_numpy(inputs), patch_size=2)[0])

    @pytest.mark.parametrize(("patch_size", "spatial"), [(2, (2, 4)), (1, (2, 1)), (2, (2, 2, 2))])
    def test_gradients(self, ops, double, attention_inputs, patch_size, spatial):
        inputs = gated(attention_inputs(spatial, patch_size, batch=2, channels=2, residual_channels=2, width=3))
        assert gradcheck(
            lambda *tensors: ops.patch_cross_attention(*grouped(tensors), patch_size=patch_size), tuple(inputs.values())
        )
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=patch_size)
        (out.square().sum() + score.square().sum()).backward()
        # A single token has nothing to choose from: the logits' parameters cannot move the output.
        unused = {"keys", "query_weight", "query_bias", "position_bias"} if patch_size == 1 else set()
        assert {name for name, tensor in inputs.items() if not tensor.grad.any()} == unused

    def test_gradients_above_a_threshold(self, ops, double, attention_inputs):
        inputs = gated(attention_inputs((2, 8), channels=2, residual_channels=2, width=3))
        score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)[1]
        ranked = score.flatten().sort().values
        threshold = ranked[3:5].mean().item()
        assert gradcheck(
            lambda *tensors: ops.patch_cross_attention(*grouped(tensors), patch_size=2, threshold=threshold),
            tuple(inputs.values()),
        )

    def test_zeros_are_finite(self, ops, attention_inputs):
        inputs = gated({name: torch.zeros_like(tensor) for name, tensor in attention_inputs().items()})
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(score, torch.full_like(score, 0.5))
        (out.sum() + score.sum()).backward()
        for name, tensor in inputs.items():
            assert tensor.grad.isfinite().all(), name

    @pytest.mark.parametrize(("name", "scored"), [("x", True), ("keys", False), ("values", False)])
    @pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 6)])
    def test_nan_stays_in_its_patch(self, ops, attention_inputs, spatial, name, scored):
        inputs = attention_inputs(spatial)
        clean, clean_score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        place = (Ellipsis, 3, 2)  # in the patch of rows 2-3 and columns 2-3, the first along the depth
        inputs[name][(1, 0, 0) if name == "x" and len(spatial) == 3 else (1, 0)][place] = math.nan
        out, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        spoiled = torch.zeros_like(out, dtype=torch.bool)
        spoiled[1, ..., 2:4, 2:4] = True
        spoiled_score = torch.zeros_like(score, dtype=torch.bool)
        spoiled_score[1, ..., 1, 1] = scored
        assert out[1, ..., 3, 2].isnan().all()
        assert torch.equal(score.isnan(), spoiled_score)
        torch.testing.assert_close(out[~spoiled], clean[~spoiled], atol=0, rtol=0)
        torch.testing.assert_close(score[~spoiled_score], clean_score[~spoiled_score], atol=0, rtol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("spatial", [(4, 6), (2, 4, 6), (4, 78)])
    def test_patches_below_the_threshold_pass_unchanged(self, ops, where, attention_inputs, spatial, dtype):
        skip_unserved(ops, where, dtype)
        inputs = attention_inputs(spatial, dtype=dtype)
        full, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        threshold = float(score.median())
        out, same_score = ops.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=threshold)
        skipped = score < threshold
        for axis in range(2, 2 + len(spatial)):
            skipped = skipped.repeat_interleave(2, axis)
        skipped = skipped.expand_as(out)
        assert skipped.any()
        assert not skipped.all()
        assert torch.equal(same_score, score)
        assert torch.equal(out[skipped], inputs["x"][skipped])
        assert torch.equal(out[~skipped], full[~skipped])

    @pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 1.0])
    def test_threshold_error_is_bounded(self, ops, attention_inputs, threshold):
        inputs = attention_inputs((8, 12))
        full, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        out, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=threshold)
        expected, _, update = loop_attention(**as_numpy(inputs), patch_size=2, threshold=threshold)
        assert_matches(out, expected)
        assert (out - full).abs().max() <= threshold * np.abs(update).max()

    def test_score_at_the_threshold_is_attended(self, ops, attention_inputs):
        inputs = attention_inputs()
        full, score = ops.patch_cross_attention(*arguments(inputs), patch_size=2)
        out, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=float(score.min()))
        assert torch.equal(out, full)

    def test_skipped_patch_ignores_a_broken_update(self, ops, attention_inputs):
        inputs = attention_inputs()
        inputs["keys"].fill_(math.nan)
        out, _ = ops.patch_cross_attention(*arguments(inputs), patch_size=2, threshold=1.0)
        assert torch.equal(out, inputs["x"])
