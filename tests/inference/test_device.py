"""A volume's way beside a device: what goes there, what comes back, and that nobody waits in between."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import noise, tiny_bundle
from waiting import META, Watched
from ways import KINDS, bundle_of, head, on_device, prepared_head, to_the_mask

from grcsf_fast import GRCSF, MaskedAutoencoder, Predictor
from grcsf_fast.data import volumes
from grcsf_fast.data.intensities import _by_sorting
from grcsf_fast.inference import case
from grcsf_fast.ops.backends import use_backend
from grcsf_fast.runtime.transfers import CPU, fetch, to_device, volumes_on


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_from_the_prepared_volume_to_the_mask(kind):
    """Residual maps, views, networks, average, resampling and thresholds; slices or windows, one lesion or several."""
    bundle, prepared = on_device(bundle_of(kind), META), prepared_head()
    prepared = replace(prepared, data=prepared.data.to(META))
    with use_backend("reference"), Watched() as watched:
        maps, probability, levels = to_the_mask(bundle, prepared)
    assert maps.device == probability.device == levels.reached.device == META
    assert levels.reached.shape == prepared.volume.data.shape[::-1]
    assert (levels.numbers is None) == (bundle.labels is None)
    # Which slices and windows hold head was decided on the processor.
    assert set(watched.waits) <= {"aten::nonzero", "aten::_local_scalar_dense"}
    assert watched.mixed == []


@pytest.mark.parametrize("modality", ["mri", "ct"])
def test_what_preparation_waits_for(modality):
    """The minimum, the object and the head's voxels; on the processor the sample and the percentiles are NumPy's."""
    with Watched() as watched:
        prepared = prepared_head(modality=modality, hu_window=(0.0, 80.0))
    before_the_box = watched.waits[: watched.waits.index("aten::nonzero")]
    assert before_the_box == (["aten::_local_scalar_dense", "aten::index", "aten::index"] if modality == "mri" else [])
    assert prepared.foreground.device == prepared.data.device == CPU


def test_a_volume_goes_there_once_and_comes_back_once(monkeypatch):
    """Of two channels each; what comes back beside the results is where the head lies."""
    there, back = [], []

    def sent(tensor, device):
        there.append(tensor.shape)
        return to_device(tensor, device)

    def fetched(tensors):
        back.append(sorted(tensors))
        return fetch(tensors)

    monkeypatch.setattr(volumes, "to_device", sent)
    monkeypatch.setattr(volumes, "fetch", fetched)
    monkeypatch.setattr(case, "fetch", fetched)
    mae = MaskedAutoencoder(2, 2, 8, 16, 1, 2, 16, 1, 2)
    bundle = replace(
        tiny_bundle(), network=GRCSF(2, 2, 1, (4, 8), 4, rcu_levels=(0,)), mae=mae, channels=("T1w", "FLAIR")
    )
    predictor = Predictor(bundle, "cpu", precision="float32")
    image = nib.Nifti1Image(head().data, head().affine)
    predictor([image, image])
    assert there == [head().data.shape[::-1]] * 2
    assert back == [["head"], ["data", "gcu_residual", "maps", "patch_score", "probability", "reached"]]


@pytest.mark.parametrize("count", [2, 64, 1001, 40_000])
@pytest.mark.parametrize("shares", [(0.5, 99.5), (0.0, 100.0), (33.3, 50.0)])
def test_percentiles_where_numpy_is_not(count, shares):
    values = torch.from_numpy(noise(count) * 1000)
    expected = [float(np.percentile(values.numpy().astype(np.float64), share)) for share in shares]
    assert _by_sorting(values, shares) == pytest.approx(expected, rel=1e-6)


def test_volumes_go_to_gpus_alone():
    """What resamples volumes is not there on every device of torch's."""
    assert volumes_on(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert volumes_on(CPU) == volumes_on(torch.device("mps")) == CPU


def test_on_the_processor_nothing_is_copied():
    tensor = torch.ones(3)
    assert to_device(tensor, CPU) is tensor
    assert fetch({"one": tensor})["one"] is tensor


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older setting alone")
def test_reports_have_what_convolutions_on_a_gpu_are_computed_in(monkeypatch):
    """Also where it was said by PyTorch's newer settings, beside which the older one cannot be read."""
    predictor = Predictor(tiny_bundle(), "cpu", precision="float32")
    predictor.device = torch.device("cuda", 0)
    assert predictor.settings()["tf32"] is True
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert predictor.settings()["tf32"] is False
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert predictor.settings()["tf32"] is False
    finally:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert predictor.settings()["tf32"] is True
