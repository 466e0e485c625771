"""Networks by themselves on disk: ``save_pretrained`` and ``from_pretrained``."""

import os

import pytest
import torch
from bundles import edit, former_bundle, same_weights, tiny_mae, tiny_network, to_version_1

from grcsf_fast import GRCSF, MaskedAutoencoder, residual_maps
from grcsf_fast.pretrained.bundle import BundleError, ResidualMapSettings, load_bundle, save_bundle


def test_a_network_alone(tmp_path):
    network = tiny_network(requires_maps=False)
    folder = network.save_pretrained(tmp_path / "network")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = GRCSF.from_pretrained(folder)
    assert loaded.config == network.config
    assert not loaded.training
    assert loaded.mae is None
    image = torch.randn(1, 1, 13, 9)
    assert torch.equal(loaded(image), network.eval()(image))


def test_weights_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    written = set()
    fsync = os.fsync

    def noted(file):
        written.add((os.fstat(file).st_ino, (tmp_path / "network").exists()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    folder = tiny_network().save_pretrained(tmp_path / "network")
    assert {(path.stat().st_ino, False) for path in folder.iterdir()} <= written
    assert len(list(folder.iterdir())) == 2


def test_a_network_trained_with_maps_asks_for_them(tmp_path):
    network = tiny_network(requires_maps=False).train()
    network(torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"^residual_maps: "):
        GRCSF.from_pretrained(network.save_pretrained(tmp_path / "b"))(torch.zeros(1, 1, 8, 8))


def test_a_network_with_its_autoencoder(tmp_path):
    network = tiny_network(mae=tiny_mae()).eval()
    network.residual_map_settings = ResidualMapSettings((0.5, 0.75), rounds=2, seed=3)
    loaded = GRCSF.from_pretrained(network.save_pretrained(tmp_path / "network"))
    assert loaded.residual_map_settings == network.residual_map_settings
    assert same_weights(loaded, network)
    assert not any(parameter.requires_grad for parameter in loaded.mae.parameters())
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(loaded(image), network(image))


def test_of_a_bundle_makes_the_maps_it_was_trained_with(folder):
    bundle, network = load_bundle(folder), GRCSF.from_pretrained(str(folder))
    image = torch.randn(2, 1, 13, 17)
    maps = residual_maps(image, bundle.mae, (0.5, 0.75), rounds=2, seed=7)
    assert torch.equal(network(image), bundle.network(image, maps))


def test_of_the_package():
    assert GRCSF.from_pretrained("demo")(torch.zeros(1, 1, 20, 33)).shape == (1, 1, 20, 33)


@pytest.mark.parametrize("version", [1, 2])
def test_weights_from_before_maps_were_a_choice_require_them(tmp_path, folder, version):
    if version == 1:
        folder = save_bundle(former_bundle(), tmp_path / "former")
        to_version_1(folder)
    else:
        edit(folder, lambda config: config["network"].pop("requires_maps"))
    assert load_bundle(folder).network.requires_maps
    assert GRCSF.from_pretrained(folder).requires_maps


def test_an_autoencoder(tmp_path, folder):
    mae = tiny_mae()
    loaded = MaskedAutoencoder.from_pretrained(mae.save_pretrained(tmp_path / "mae"))
    assert same_weights(loaded, mae)
    assert not loaded.training
    assert same_weights(MaskedAutoencoder.from_pretrained(folder), load_bundle(folder).mae)


def test_the_other_network_is_asked_for(tmp_path):
    with pytest.raises(BundleError, match="expected a segmentation network, found an autoencoder alone"):
        GRCSF.from_pretrained(tiny_mae().save_pretrained(tmp_path / "mae"))
    with pytest.raises(BundleError, match="expected an autoencoder, found a network without one"):
        MaskedAutoencoder.from_pretrained(tiny_network().save_pretrained(tmp_path / "network"))


def test_networks_alone_are_no_bundle(tmp_path):
    """Nothing says how volumes were prepared for them."""
    with pytest.raises(BundleError, match=r"'preprocessing'.*read them with from_pretrained"):
        load_bundle(tiny_network().save_pretrained(tmp_path / "network"))


@pytest.mark.parametrize("kind", [GRCSF, MaskedAutoencoder])
@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("mae"),
        lambda c: c.update(version=99),
        lambda c: c["network"].update(flavour=1) or c["mae"].update(flavour=1),
        lambda c: c.update(weights_sha256="0"),
    ],
)
def test_damage_is_seen(folder, kind, damage):
    edit(folder, damage)
    with pytest.raises(BundleError):
        kind.from_pretrained(folder)
