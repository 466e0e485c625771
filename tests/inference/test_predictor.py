"""The predictor in Python: what it takes, devices, folders, networks of other kinds."""

import copy
import csv
import itertools
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from awake import awake
from commands import predict
from heads import SPACING, tiny_bundle
from monai.data import MetaTensor
from monai.data.utils import dense_patch_slices
from monai.inferers import sliding_window_inference
from torch._subclasses import FakeTensor, FakeTensorMode

from grcsf_fast import GRCSF, MaskedAutoencoder, Predictor
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.volumes import Preprocessing, VolumeError, load_volume, prepare
from grcsf_fast.errors import ArgumentError
from grcsf_fast.inference.record import Done, Failed, Finished
from grcsf_fast.ops.backends import select_backend
from grcsf_fast.pretrained.bundle import Bundle, BundleError, load_bundle
from grcsf_fast.runtime.precision import choose_device, choose_precision


def test_devices_that_only_the_reference_knows(monkeypatch):
    """Such as Apple's GPU: nothing refuses it by its name where torch has it."""
    with pytest.raises(ValueError, match="'mps' was asked for, and torch cannot compute on it"):
        choose_device("mps")
    with pytest.raises(ValueError, match="'meta' was asked for, and torch cannot compute on it"):
        choose_device("meta")
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, dtype: real(*shape, dtype=dtype))
    device = choose_device("mps")
    assert device == torch.device("mps")
    assert choose_precision("auto", device).precision == "float32"
    assert select_backend(FakeTensor(FakeTensorMode(), torch.empty(2, device="meta"), device)) == "reference"


def test_images_in_memory(bundle_folder, scan):
    """Arrays and tensors with their affine give what the file gives."""
    predictor = Predictor(bundle_folder)
    image = nib.load(scan)
    data = np.asarray(image.dataobj)
    expected = predictor(scan)
    for found in (
        predictor(image),
        predictor(data, affine=image.affine),
        predictor(data.astype(np.float64)[None], image.affine.tolist()),
        predictor(torch.from_numpy(data), torch.from_numpy(image.affine)),
        predictor(MetaTensor(torch.from_numpy(data), image.affine)),
        predictor(MetaTensor(torch.from_numpy(data)[None], image.affine)),
        *predictor.predict_many([MetaTensor(torch.from_numpy(data), image.affine)]),
    ):
        assert np.array_equal(found.mask.dataobj, expected.mask.dataobj)
        np.testing.assert_array_equal(found.mask.affine, expected.mask.affine)
        assert found.report["lesions"] == expected.report["lesions"]
        assert all(torch.equal(found.values[key], one) for key, one in expected.values.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((4, 4, 4)),), r"^affine: expected a \(4, 4\) matrix from voxels to RAS mm beside an array"),
        ((torch.ones(4, 4, 4),), r"^affine: expected a \(4, 4\) matrix"),
        ((np.ones((4, 4, 4)), np.eye(3)), r"^affine: expected a \(4, 4\) matrix, got float64 of shape \(3, 3\)"),
        ((np.ones((4, 4, 4)), "RAS"), r"^affine: expected a \(4, 4\) matrix, got <U3"),
        ((np.ones((4, 4)), np.eye(4)), r"^source: expected \(X, Y, Z\) or \(1, X, Y, Z\), got shape \(4, 4\)"),
        ((np.ones((2, 4, 4, 4)), np.eye(4)), r"^source: expected .*, got shape \(2, 4, 4, 4\)"),
        ((np.ones((4, 4, 4), complex), np.eye(4)), r"^source: expected real numbers, got complex128"),
        (("scan.nii.gz", np.eye(4)), r"^affine: expected none beside str, which has its own"),
    ],
)
def test_arrays_that_are_no_volumes(bundle_folder, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Predictor(bundle_folder)(*arguments)


def test_a_folder_in_python(bundle_folder, scan, tmp_path):
    """The same results as from the command line, one for each case; the second time they are there."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.nii.gz").write_bytes(scan.read_bytes())
    (source / "cut.nii.gz").write_bytes(scan.read_bytes()[:3000])
    predictor = Predictor(bundle_folder)
    found = {result.name: result for result in predictor.predict_folder(source, output)}
    assert {name: type(result) for name, result in found.items()} == {"a": Done, "b": Done, "cut": Failed}
    assert "cut.nii.gz" in found["cut"].error
    assert found["a"].report["lesion_count"] > 0
    assert predict("-i", source, "-o", tmp_path / "other", "-m", bundle_folder) == 1
    for path in (tmp_path / "other").glob("*.nii.gz"):
        assert (output / path.name).read_bytes() == path.read_bytes()
    again = {result.name: result for result in predictor.predict_folder(source, output)}
    assert {name: type(result) for name, result in again.items()} == {"a": Finished, "b": Finished, "cut": Failed}
    assert again["a"].report == json.loads((output / "a_report.json").read_text())
    with pytest.raises(ArgumentError, match="another folder"):
        predictor.predict_folder(source, source)


def test_a_folder_run_that_is_left_early(bundle_folder, scan, tmp_path):
    """What was not reached, and is not on disk either, is "missing" in the summary."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        (source / f"{name}.nii.gz").write_bytes(scan.read_bytes())
    results = Predictor(bundle_folder).predict_folder(source, output)
    assert not output.exists()
    next(results)
    results.close()
    with (output / "summary.csv").open(newline="") as file:
        statuses = {row["case"]: row["status"] for row in csv.DictReader(file)}
    assert statuses == {name: "done" if (output / f"{name}_report.json").exists() else "missing" for name in "abc"}


def test_a_three_dimensional_bundle_slides_its_window(scan):
    """Windows of its size alone, at MONAI's places and put together as MONAI does."""
    torch.manual_seed(0)
    mae = MaskedAutoencoder(3, 1, 8, embed_dim=18, depth=1, num_heads=2, decoder_dim=18, decoder_depth=1,
                            decoder_num_heads=2)  # fmt: skip
    network = awake(GRCSF(3, 1, 1, features=(4, 8), rcu_levels=(0,), residual_channels=4)).eval()
    predictor = Predictor(Bundle(network, mae, Preprocessing(SPACING), roi_size=(16, 16, 16)), precision="float32")
    seen = []
    predictor.network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    prediction = predictor(scan)
    assert {shape[1:] for shape in seen} == {(1, 16, 16, 16)}
    places = dense_patch_slices(prediction.prepared.data.shape, (16, 16, 16), (12, 12, 12))
    assert sum(shape[0] for shape in seen) == len(places) > 1
    images = torch.stack([prediction.prepared.data, prediction.values[0.5], prediction.values[0.75]])[None]
    with torch.no_grad():
        logits = sliding_window_inference(
            images, (16, 16, 16), 1, lambda one: network(one[:, :1], one[:, 1:]), overlap=0.25, mode="gaussian"
        )
    torch.testing.assert_close(prediction.values["probability"], logits[0, 0].sigmoid(), atol=1e-4, rtol=1e-4)
    assert prediction.mask.shape == nib.load(scan).shape
    assert np.isfinite(np.asarray(prediction.probability.dataobj)).all()


def test_a_volume_is_seen_in_several_ways(scan):
    """Enlarged, mirrored and both: the mean of what the network makes of each view, by hand."""
    bundle = replace(tiny_bundle(neighbours=1), tta_flip=True, tta_scales=(1.0, 1.25))
    network = bundle.network.eval()
    prediction = Predictor(bundle, precision="float32")(scan)
    data, held = prediction.prepared.data, prediction.prepared.foreground.any(0).any(0)
    maps = torch.stack([prediction.values[0.5], prediction.values[0.75]])
    images = torch.cat([network.stack(data, torch.arange(data.shape[2])), maps.permute(3, 0, 1, 2)], 1)
    views = []
    for scale in (1.0, 1.25):
        large = F.interpolate(images, [round(size * scale) for size in data.shape[:2]], mode="bilinear")
        for axes in ((), (2,)):  # left to right
            one = large.flip(axes)
            with torch.no_grad():
                found = network(one[:, :3], one[:, 3:]).sigmoid().flip(axes)
            views.append(F.interpolate(found, data.shape[:2], mode="bilinear")[:, 0].permute(1, 2, 0) * held)
    assert all((one - other).abs().max() > 0.01 for one, other in itertools.combinations(views, 2))
    expected = torch.stack(views).mean(0)
    torch.testing.assert_close(prediction.values["probability"], expected, atol=1e-4, rtol=1e-4)


CLASSES = Labels(("oedema", "core", "rim"), ((3,), (1,), (7,)))
REGIONS = Labels(("whole", "core", "rim"), ((1, 2, 4), (2, 4), (4,)), exclusive=False)


@pytest.mark.parametrize(("labels", "numbers"), [(CLASSES, (3, 1, 7)), (REGIONS, (1, 2, 4))])
def test_the_number_of_each_label_at_its_voxels(labels, numbers):
    """Of a CT that the networks' grid holds as it is, 20, 40 and 60 units are marked, by logits of the intensities."""
    data = np.full((13, 11, 10), -1000, np.float32)
    data[1:-1, 1:-1, 1:-1] = 0
    expected = np.zeros(data.shape, np.uint8)
    for place, units, number in zip((2, 5, 8), (20, 40, 60), numbers, strict=True):
        box = (slice(place, place + 2), slice(3, 3 + place // 2), slice(4, 5))
        data[box], expected[box] = units, number
    affine = np.array([[0, -4.0, 0, 20], [-4, 0, 0, 30], [0, 0, 4, -5], [0, 0, 0, 1]])
    network = GRCSF(2, 1, labels.outputs, features=(4, 8), rcu_levels=(), gcu=False)
    preprocessing = Preprocessing((4.0, 4.0, 4.0), "ct", hu_window=(0.0, 80.0))
    predictor = Predictor(Bundle(network, None, preprocessing, labels=labels), precision="float32")

    def marked(module, inputs, output):
        levels = torch.tensor([-1.0, -0.5, 0.0, 0.5])[:, None, None]  # of 0, 20, 40 and 60 units
        logits = -100 * (inputs[0] - levels).abs() if labels.exclusive else 100 * (inputs[0] - levels[1:] + 0.25)
        return logits, output[1]

    predictor.network.register_forward_hook(marked)
    prediction = predictor(data, affine)
    mask = np.asarray(prediction.mask.dataobj)
    assert mask.any()
    assert np.array_equal(mask, expected)
    for name, own in zip(labels.names, labels.numbers, strict=True):
        volume = prediction.report["labels"][name]["total_volume_ml"]
        assert volume == pytest.approx(np.isin(expected, own).sum() * 0.064, abs=1e-4)


def test_a_network_without_rcu_needs_no_autoencoder(scan, tmp_path):
    bundle = tiny_bundle(rcu_levels=())
    prediction = Predictor(Bundle(bundle.network, None, bundle.preprocessing))(scan)
    assert prediction.residual_maps == {}
    written = prediction.save(tmp_path)
    assert sorted(path.name for path in written) == ["scan.nii.gz", "scan_overlay.png", "scan_report.json"]


def test_a_network_that_was_trained_with_blank_maps_needs_no_autoencoder(scan):
    bundle = tiny_bundle()
    prediction = Predictor(Bundle(bundle.network, None, bundle.preprocessing))(scan)
    assert prediction.residual_maps == {}
    bundle.network.requires_maps = True
    with pytest.raises(BundleError, match="trained with residual maps, and it holds no autoencoder"):
        Predictor(Bundle(bundle.network, None, bundle.preprocessing))


def test_a_folder_of_such_a_network_is_resumed(scan, tmp_path):
    """Without an autoencoder there are no residual maps to miss."""
    bundle = tiny_bundle()
    predictor = Predictor(Bundle(bundle.network, None, bundle.preprocessing))
    for kind in (Done, Finished):
        (result,) = predictor.predict_folder(scan.parent, tmp_path / "out")
        assert isinstance(result, kind)


def test_weights_that_changed_since_they_were_read_are_other_settings():
    bundle = tiny_bundle()
    first = Predictor(bundle).settings()
    assert first == Predictor(bundle).settings()
    with torch.no_grad():
        bundle.network.output.bias += 1
    changed = Predictor(bundle).settings()
    assert {name for name in first if first[name] != changed[name]} == {"values_sha256"}
    with torch.no_grad():
        next(bundle.mae.parameters()).add_(1)
    assert Predictor(bundle).settings()["values_sha256"] != changed["values_sha256"]


def test_a_report_names_the_file_of_the_weights_that_ran_alone(bundle_folder, scan):
    read = load_bundle(bundle_folder)
    assert Predictor(read)(scan).report["settings"]["weights_sha256"] == read.weights_sha256 != ""
    other_thresholds = replace(read, probability_threshold=0.3)
    assert Predictor(other_thresholds).settings()["weights_sha256"] == read.weights_sha256
    tuned = copy.deepcopy(read.network)
    with torch.no_grad():
        tuned.output.bias += 1
    exchanged = Predictor(replace(read, network=tuned))(scan).report["settings"]
    assert exchanged["weights_sha256"] == ""
    assert exchanged["values_sha256"] == replace(read, network=tuned, weights_sha256="").hashes()["values_sha256"]
    read.network.load_state_dict(tuned.state_dict())  # in its place
    assert Predictor(read).settings()["weights_sha256"] == ""


def test_numbers_that_are_none_are_no_empty_mask(scan):
    bundle = tiny_bundle()
    with torch.no_grad():
        bundle.network.output.bias.fill_(float("nan"))
    with pytest.raises(VolumeError, match=r"scan.nii.gz: expected finite numbers of the networks, got a probability"):
        Predictor(bundle)(scan)


def test_a_mask_replaces_no_file_that_is_no_result(scan, tmp_path):
    prediction = Predictor(tiny_bundle())(scan)
    truth = tmp_path / "scan.nii.gz"
    truth.write_bytes(b"somebody's work")
    with pytest.raises(ArgumentError, match=r"expected no file, or a result with scan_report.json beside it"):
        prediction.save(tmp_path)
    assert truth.read_bytes() == b"somebody's work"
    assert list(tmp_path.iterdir()) == [truth]
    truth.unlink()
    prediction.save(tmp_path)
    prediction.save(tmp_path)  # its own result


def test_channels_in_messages(scan):
    """Of several channels the one that is wrong."""
    volume = load_volume(scan)
    dark = np.zeros_like(volume.data)
    dark[:2, 0, 0] = 100
    with pytest.raises(VolumeError, match="channel 1: expected a head, found"):
        prepare(replace(volume, others=(dark,)), Preprocessing(SPACING))
