"""Networks that are copied, sent, moved and wrapped, as training scripts do it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from small import autoencoder, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grcsf_fast.networks.unet import drop_cancelled_biases


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "memory"])
def test_copies(way, lowered):
    model = network(importance_threshold=0.25)
    if lowered:
        model = model.optimized_for_inference(torch.bfloat16, fused=False)
    image, maps = torch.randn(1, 1, 9, 14), torch.rand(1, 2, 9, 14)
    expected = model(image, maps)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        torch.save(model, stored := io.BytesIO())
        copied = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    else:
        copied = copy.deepcopy(model).share_memory()
        assert all(tensor.is_shared() for tensor in copied.parameters())
    assert torch.equal(copied(image, maps), expected)
    copied.importance_threshold = 1.0
    assert model.importance_threshold == model.config["importance_threshold"] == 0.25


def test_lowered_and_back():
    """The dtype behind the first convolution follows the network's."""
    model = network()
    image, maps = torch.randn(1, 1, 9, 14), torch.rand(1, 2, 9, 14)
    names = list(model.state_dict())
    for dtype in (torch.bfloat16, torch.float16):
        lowered = model.optimized_for_inference(dtype, fused=False)
        assert list(lowered.state_dict()) == names
        assert lowered(image, maps).dtype == lowered.dtype == dtype
        assert lowered.float()(image, maps).dtype == torch.float32
        assert lowered.optimized_for_inference(torch.float64, fused=False)(image.double(), maps).dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(model.optimized_for_inference(fused=False)(image, maps), model(image, maps))


def test_biases_that_a_norm_takes_away():
    """Left out on a GPU; here by hand."""
    model = network().double().eval()
    with torch.no_grad():
        for one in model.modules():
            if isinstance(one, nn.Conv2d):
                one.bias.normal_()
    image, maps = torch.randn(1, 1, 9, 14).double(), torch.rand(1, 2, 9, 14).double()
    hooked = model.encoder[1][0]
    hooked.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        expected = model(image, maps)
        drop_cancelled_biases(model)
        torch.testing.assert_close(model(image, maps), expected)
    left = [name for name, one in model.named_modules() if isinstance(one, nn.Conv2d) and one.bias is not None]
    # The hooked one; those that no norm follows.
    assert left == ["encoder.1.0", *[name for name in left if name.endswith("stem.3")], "output"]


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("static", [False, True])
def test_distributed_training(one_process_group, static):
    """A step of a wrapped network is that of the network: every parameter takes part, the autoencoder's none."""
    model = network(mae=autoencoder()).train()
    image = torch.randn(2, 1, 9, 14)
    gradients = []
    for one in (model, DistributedDataParallel(copy.deepcopy(model), static_graph=static)):
        for _ in range(2):
            one.zero_grad()
            logits, maps = one(image, return_maps=True)
            (logits.square().mean() + sum(score.mean() for score in maps.patch_scores.values())).backward()
        gradients.append([parameter.grad for parameter in one.parameters() if parameter.requires_grad])
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def test_data_parallel():
    model = network(mae=autoencoder())
    image = torch.randn(2, 1, 9, 14)
    assert torch.equal(nn.DataParallel(model)(image), model(image))
