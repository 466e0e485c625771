"""Convolutions of two images, one behind the other in the channels, that are not copied into one."""

import pytest
import torch
from torch import nn

from grcsf_fast.networks.fast_layers import FastConvolution
from grcsf_fast.networks.unet import JoinedStage, conv
from grcsf_fast.ops import cpp

pytestmark = pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 24, 8, 12), (1, 16, 1, 9, 4)])
def test_the_bits_of_a_copy(shape, dtype):
    x = torch.randn(shape).to(dtype)
    first, second = x.split([11, shape[1] - 11], 1)
    layer = FastConvolution(conv(len(shape) - 2, shape[1], 11))
    stage = JoinedStage(layer, nn.LeakyReLU())
    with torch.no_grad():
        assert torch.equal(stage(first, second), stage[1](layer(x)))
        seen = []
        handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        assert torch.equal(stage(first, second), stage[1](layer(x)))
        handle.remove()
        with pytest.raises(ValueError, match=r"x: expected \(B,"):
            layer.joined(first, first)
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("shape", [(2, 8, 20, 20), (1, 8, 28, 28), (3, 8, 20, 20)])
def test_blocks_of_which_the_last_is_nearly_empty(shape, threads):
    """By all threads together or by one each: the same bits."""
    x, layer = torch.randn(shape), FastConvolution(conv(2, 8, 19))
    with torch.no_grad():
        alone = layer(x)
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), alone)
