"""Trained networks that are trained on, also with other channels and outputs; and what could not be loaded again."""

import copy
import warnings

import numpy as np
import pytest
import torch
from bundles import same_weights, tiny_bundle, tiny_mae, tiny_network
from small import autoencoder

from grcsf_fast import GRCSF, Intensities, Labels, Predictor
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.errors import ArgumentError, ArgumentTypeError
from grcsf_fast.pretrained.bundle import Bundle, BundleError, load_bundle, save_bundle


@pytest.fixture
def folder(tmp_path):
    network = tiny_network(neighbours=1, importance_threshold=0.25)
    network.residual_map_settings = tiny_bundle().residual_maps
    network.mae = tiny_mae()
    return network.save_pretrained(tmp_path / "network")


def image_and_maps(channels=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, 16, 16, generator=generator), torch.rand(2, 2, 16, 16, generator=generator)


def test_further_channels_begin_without_a_say(folder):
    """With weights of 0, so that the network is what it was on its first channel, neighbours included."""
    trained = GRCSF.from_pretrained(folder)
    trained.importance_threshold = 0.0
    network = GRCSF.from_pretrained(folder, in_channels=3)
    assert (network.in_channels, network.seen_channels, network.out_channels) == (3, 9, 1)
    assert network.importance_threshold == 0
    assert network.residual_map_settings == trained.residual_map_settings
    image, maps = image_and_maps(9)
    expected = trained(image[:, ::3], maps)
    assert torch.allclose(network(image, maps), expected, atol=1e-6)
    network.train()(image, maps).sum().backward()
    assert network.encoder[0][0].weight.grad[:, 1].abs().max() > 0


def test_fewer_channels_are_the_first_ones(tmp_path):
    network = GRCSF(2, 2, 1, features=(4, 8), rcu_levels=(), neighbours=1)
    alone = GRCSF.from_pretrained(network.save_pretrained(tmp_path / "two"), in_channels=1)
    assert torch.equal(alone.encoder[0][0].weight, network.encoder[0][0].weight[:, ::2])


def test_other_outputs_have_a_new_convolution_alone(folder):
    torch.manual_seed(1)
    network, trained = GRCSF.from_pretrained(folder, out_channels=3), GRCSF.from_pretrained(folder)
    image, maps = image_and_maps()
    assert network(image, maps).shape == (2, 3, 16, 16)
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("output.")}
    given = trained.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in own.items())
    assert len(given) == len(own) + 2
    assert network.mae is not None
    assert same_weights(network.mae, trained.mae)


def test_an_autoencoder_of_other_channels_is_left_out(folder):
    network = GRCSF.from_pretrained(folder, in_channels=2)
    assert network.mae is None
    with pytest.raises(ArgumentError, match=r"\(image, mae, \*\*asdict\(network\.residual_map_settings\)\)"):
        network(image_and_maps(2)[0])
    network.requires_maps = False
    assert network(image_and_maps(2)[0]).shape == (2, 1, 16, 16)


def test_what_was_adapted_loads_again(folder, tmp_path):
    network = GRCSF.from_pretrained(folder, in_channels=2, out_channels=3)
    loaded = GRCSF.from_pretrained(network.save_pretrained(tmp_path / "adapted"))
    assert loaded.config == network.config
    assert same_weights(loaded, network)


@pytest.mark.parametrize("default", [{"dtype": torch.float64}, {"device": "meta"}])
def test_defaults_of_torch_change_nothing(folder, default):
    """Weights that were copied to a device without memory would be none."""
    expected = GRCSF.from_pretrained(folder, in_channels=2)
    torch.set_default_dtype(default.get("dtype", torch.float32))
    torch.set_default_device(default.get("device"))
    try:
        network = GRCSF.from_pretrained(folder, in_channels=2)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)


def test_numbers_that_cannot_be(folder):
    with pytest.raises(ArgumentError, match=r"^out_channels: expected a whole number from 1 up, of 63 bits, got -1$"):
        GRCSF.from_pretrained(folder, out_channels=-1)
    with pytest.raises(ArgumentError, match=r"^in_channels: expected a whole number from 1 up, of 63 bits, got 0$"):
        GRCSF.from_pretrained(folder, in_channels=0)
    with pytest.raises(ArgumentError, match=r"^features: expected the channels of at least 2 stages, .*, got 32$"):
        GRCSF(2, 1, 1, features=32)
    with pytest.raises(ArgumentError, match=r"^in_channels: expected a whole number from 1 up, of 63 bits, got 1\.0$"):
        GRCSF(2, 1.0, 1)
    with pytest.raises(
        ArgumentError, match=r"^rcu_levels: expected a list of whole numbers of at most 63 bits, got 1$"
    ):
        GRCSF(2, 1, 1, rcu_levels=1)
    with pytest.raises(ArgumentError, match=r"^mask_ratios: expected numbers in \(0, 1\), one per map, got 0\.5$"):
        GRCSF(2, 1, 1, mask_ratios=0.5)


def test_who_trains_on_is_told_of_the_threshold(folder):
    """It was chosen for weights that training changes, and would be met in evaluation mode alone."""
    network = GRCSF.from_pretrained(folder)
    image, maps = image_and_maps()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(image, maps)
        with torch.no_grad():
            network.train()(image, maps)
    with pytest.warns(UserWarning, match=r"importance_threshold 0\.25 was chosen for other weights .* = 0 to train on"):
        network(image, maps)
    network.importance_threshold = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(image, maps)


def test_who_trains_on_in_evaluation_mode_is_told_of_the_patches_that_learn_nothing(folder):
    network = GRCSF.from_pretrained(folder)
    network.importance_threshold = 1.0
    image, maps = image_and_maps()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = network(image, maps)
    with pytest.warns(UserWarning, match=r"^importance_threshold 1: .* no gradients; .* network\.train\(\) and set"):
        logits.sum().backward()
    assert all((unit.output_weight.grad == 0).all() for unit in network.rcu.values())
    assert GRCSF.from_pretrained(folder).requires_grad_(False)(image, maps).grad_fn is None


@pytest.mark.parametrize("training", [False, True])
def test_nobody_is_told_of_patches_where_there_is_no_unit_that_skips_some(training):
    network = tiny_network(rcu_levels=(), importance_threshold=0.5).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(image_and_maps()[0]).sum().backward()


def exchanged_head():
    network = tiny_network()
    network.output = torch.nn.Conv2d(4, 3, 1)
    return network


def further_layer():
    network = tiny_network()
    network.extra = torch.nn.Linear(2, 2)
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (exchanged_head, r"^network\.output\.bias: expected \(1,\), as network\.config builds it, got \(3,\): a layer"),
        (further_layer, r"^network\.extra\.bias: expected no such weights, as network\.config builds it, got \(2,\)"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, network, message):
    with pytest.raises(ArgumentError, match=message):
        network().save_pretrained(tmp_path / "network")
    assert not (tmp_path / "network").exists()


def test_a_predictor_of_an_exchanged_head(tmp_path):
    bundle = Bundle(exchanged_head(), tiny_mae(), Preprocessing())
    with pytest.raises(BundleError, match=r"expected 1 outputs of its network, as its config says, found 3"):
        Predictor(bundle)
    with pytest.raises(BundleError, match="found 3"):
        save_bundle(bundle, tmp_path / "b")
    with pytest.raises(ArgumentTypeError, match=r"^bundle: expected a bundle, .* got a network; Bundle\(network, mae"):
        Predictor(tiny_network())


@pytest.mark.parametrize("requires_maps", [False, True])
def test_a_bundle_has_the_autoencoder_that_its_network_has(tmp_path, requires_maps):
    mae = tiny_mae().eval()
    network = tiny_network(mae=mae, requires_maps=requires_maps).eval()
    bundle = Bundle(network, None, Preprocessing(spacing=(1.0, 1.0, 1.0)))
    assert bundle.mae is mae
    loaded = load_bundle(save_bundle(bundle, tmp_path / "b"))
    assert same_weights(loaded.mae, mae)
    data = np.random.default_rng(0).normal(100, 20, (24, 24, 6)).astype(np.float32)
    found = [Predictor(one, precision="float32")(data, np.eye(4)).probability for one in (bundle, loaded)]
    assert np.array_equal(*(np.asarray(one.dataobj) for one in found))


def test_two_autoencoders_are_one_too_many():
    mae = tiny_mae()
    network = tiny_network(mae=mae)
    assert Bundle(copy.deepcopy(network), mae, Preprocessing()).mae is mae
    with pytest.raises(ArgumentError, match=r"^mae: expected the network's own autoencoder, or none beside it"):
        Bundle(tiny_network(mae=tiny_mae()), tiny_mae(), Preprocessing())


@pytest.mark.parametrize(("network_dims", "mae_dims"), [(2, 3), (3, 2)])
def test_an_autoencoder_of_other_dimensions_makes_no_maps(network_dims, mae_dims):
    network, mae = GRCSF(network_dims, 1, 1, features=(4, 8)), autoencoder(mae_dims)
    said = rf"^mae: expected an autoencoder of {network_dims} dimensions as the network is, got one of {mae_dims}$"
    with pytest.raises(ArgumentError, match=said):
        Bundle(network, mae, Preprocessing())
    assert Bundle(GRCSF(network_dims, 1, 1, features=(4, 8), rcu_levels=()), mae, Preprocessing()).mae is mae


def test_a_compiled_autoencoder_is_saved_as_it_was(tmp_path):
    mae = tiny_mae()
    network = tiny_network(mae=torch.compile(mae, backend="eager"))
    assert Bundle(network, mae, Preprocessing()).mae is mae
    bundle = Bundle(network, None, Preprocessing())
    for loaded in (
        GRCSF.from_pretrained(network.save_pretrained(tmp_path / "network")).mae,
        load_bundle(save_bundle(bundle, tmp_path / "bundle")).mae,
    ):
        assert same_weights(loaded, mae)


def test_the_same_autoencoder_in_another_precision_is_named_as_that():
    mae = tiny_mae()
    network = tiny_network(mae=copy.deepcopy(mae)).half()
    said = r"none beside it, got one in torch\.float32 where the network's is in torch\.float16$"
    with pytest.raises(ArgumentError, match=said):
        Bundle(network, mae, Preprocessing())
    assert Bundle(network, mae.half(), Preprocessing()).mae is mae


def test_channels_and_outputs_are_named_before_they_are_saved(tmp_path):
    network = GRCSF(2, 2, 3, features=(4, 8), rcu_levels=())
    with pytest.raises(BundleError, match=r"expected in_channels 1 .*found 2: .*Bundle\(\.\.\., channels=\(\"T1w\", "):
        save_bundle(Bundle(network, None, Preprocessing()), tmp_path / "b")
    named = {"channels": ("a", "b")}
    with pytest.raises(BundleError, match=r"expected out_channels 1 .*found 3: .*Bundle\(\.\.\., labels=Labels\(names"):
        save_bundle(Bundle(network, None, Preprocessing(), **named), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    named |= {"labels": Labels(("core", "rim"), ((1,), (2,)))}
    bundle = Bundle(network, None, Preprocessing(others=(Intensities("ct"),)), **named)
    assert load_bundle(save_bundle(bundle, tmp_path / "b")).labels == named["labels"]
