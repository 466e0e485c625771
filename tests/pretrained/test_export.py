"""Networks for other programs: ONNX by onnxruntime, programs of torch.export, and the command."""

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from awake import awake
from bundles import tiny_bundle, tiny_mae, tiny_network
from small import network

from grcsf_fast.cli import main
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.errors import ArgumentError
from grcsf_fast.ops import cpp
from grcsf_fast.pretrained.bundle import Bundle, ResidualMapSettings, load_bundle, save_bundle
from grcsf_fast.pretrained.export import SETTINGS_NAME, _settings, export_onnx, export_program
from grcsf_fast.pretrained.monai_bundle import export_monai

ODD = {2: [(33, 50), (8, 17), (1, 3)], 3: [(17, 9, 12), (1, 2, 3)]}
slow = pytest.mark.slow
with_kernels = pytest.mark.skipif(cpp.problem() is not None, reason="the C++ kernels are not built")


def bundles():
    return {
        "with maps": lambda: tiny_bundle(),
        "two channels": lambda: replace(
            tiny_bundle(),
            network=network(2, in_channels=2, mask_ratios=(0.5,)),
            residual_maps=ResidualMapSettings((0.5,)),
        ),
        "without maps": lambda: replace(tiny_bundle(), network=tiny_network(rcu_levels=())),
        "3-D": lambda: Bundle(network(3, rcu_levels=(0,)), None, Preprocessing()),
        "demo": lambda: load_bundle("demo"),
    }


def images(model, batch, spatial):
    """Image and, where the network takes them, maps."""
    tensors = [torch.randn(batch, model.seen_channels, *spatial), torch.randn(batch, len(model.mask_ratios), *spatial)]
    return tensors[: 2 if model.rcu else 1]


@pytest.mark.parametrize(
    "kind", [kind if kind == "without maps" else pytest.param(kind, marks=slow) for kind in bundles()]
)
def test_onnx_of_any_size(tmp_path, kind):
    bundle = bundles()[kind]()
    model = bundle.network.eval()
    path = export_onnx(bundle, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path))
    names = [one.name for one in session.get_inputs()]
    assert names == ["image", "residual_maps"][: len(names)]
    assert session.get_inputs()[0].shape == ["batch", model.seen_channels, "x", "y", "z"][: 2 + model.spatial_dims]
    for spatial in ODD[model.spatial_dims]:
        for batch in (1, 3):
            given = images(model, batch, spatial)
            with torch.no_grad():
                expected = model(*given).numpy()
            (found,) = session.run(None, {name: one.numpy() for name, one in zip(names, given, strict=True)})
            # Of logits up to 50 with the demo's weights; measured 7e-5 there.
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)
    settings = json.loads(session.get_modelmeta().custom_metadata_map[SETTINGS_NAME])
    assert settings["preprocessing"]["spacing"] == list(bundle.preprocessing.spacing)
    assert (settings["residual_maps"] is None) == (len(names) == 1 or bundle.mae is None)
    assert (settings["channels"], settings["neighbours"]) == (list(bundle.channels), bundle.network.neighbours)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("neighbours", [0, 1, 2])
def test_how_many_neighbours_a_slice_is_seen_with(neighbours):
    bundle = replace(tiny_bundle(), network=tiny_network(neighbours=neighbours))
    assert json.loads(_settings(bundle, bundle.network))["neighbours"] == neighbours


@with_kernels
@slow
@pytest.mark.parametrize("kind", [kind for kind in bundles() if kind != "with maps"])
def test_programs(tmp_path, kind):
    bundle = bundles()[kind]()
    check_program(export_program(bundle, tmp_path / "model.pt2"), bundle.network.eval())


def check_program(path, model):
    """It calls our ops, and finds what the network finds."""
    settings = {SETTINGS_NAME: ""}
    program = torch.export.load(path, extra_files=settings)
    assert json.loads(settings[SETTINGS_NAME])["multiple"] == model.multiple
    called = {str(node.target) for node in program.graph.nodes}
    assert "grcsf_fast.multiscale_compensation.default" in called
    assert ("grcsf_fast.patch_cross_attention.default" in called) == bool(model.rcu)
    least = max(2, -(-model.minimum // model.multiple))
    run = program.module()
    for counts in ((least, least, least), (least + 1, least + 3, least + 2)):
        for batch in (1, 3):
            given = images(model, batch, [count * model.multiple for count in counts][: model.spatial_dims])
            with torch.no_grad():
                torch.testing.assert_close(run(*given), model(*given), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("write", [export_onnx, export_program, export_monai])
def test_an_autoencoder_alone(tmp_path, write):
    with pytest.raises(ArgumentError, match="expected a segmentation network, found an autoencoder alone"):
        write(replace(tiny_bundle(), network=None), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@with_kernels
def test_the_command(tmp_path, capsys):
    bundle = tiny_bundle()
    save_bundle(bundle, tmp_path / "bundle")
    arguments = ["export", "-m", str(tmp_path / "bundle")]
    output, folder = tmp_path / "new" / "model.PT2", tmp_path / "monai"
    assert main([*arguments, "-o", str(output), "--monai", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {output}\nwrote {folder}\n"
    check_program(output, bundle.network.eval())
    assert (folder / "configs" / "inference.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --output or --monai, got neither"),
        (["-o", "model.pth"], "--output: expected the name of a file ending in .onnx or .pt2, got model.pth"),
        (["-o", "model.onnx", "-m", "nowhere"], "nowhere: expected a bundle's folder"),
    ],
)
def test_usage(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_the_extra_is_named(monkeypatch, tmp_path, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", "-o", str(tmp_path / "model.onnx")]) == 2
    said = capsys.readouterr().err
    assert f"the package '{package}' is missing; in a checkout of grcsf-fast: pip install \".[export]\"" in said


def test_settings_beside_a_network_name_the_file_of_its_weights_alone(tmp_path):
    read = load_bundle(save_bundle(tiny_bundle(), tmp_path / "bundle"))
    tuned = replace(read, network=awake(copy.deepcopy(read.network)))
    for bundle, expected in ((read, read.weights_sha256), (tuned, "")):
        said = json.loads(_settings(bundle, bundle.network))
        metadata = json.loads(
            (export_monai(bundle, tmp_path / f"monai{expected}") / "configs" / "metadata.json").read_text()
        )
        for found in (said, metadata):
            assert found["weights_sha256"] == expected
            assert found["values_sha256"] == bundle.hashes()["values_sha256"]


def test_a_bundle_knows_the_file_of_its_own_autoencoder(tmp_path):
    network = awake(tiny_network())
    network.mae = tiny_mae()
    maps = ResidualMapSettings((0.5, 0.75))
    read = load_bundle(save_bundle(Bundle(network, None, Preprocessing(), maps), tmp_path / "bundle"))
    read.network.mae = read.mae
    assert read.hashes()["weights_sha256"] == read.weights_sha256
