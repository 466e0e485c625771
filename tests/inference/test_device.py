"""A volume's way beside a device: what goes there, what comes back, and that nobody waits in between."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import SPACING, noise, tiny_bundle
from streams import together
from waiting import META, Watched, on_meta

from grcsf_fast import MaskedAutoencoder
from grcsf_fast.data.intensities import _by_sorting
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.volumes import Preprocessing, load_volume, prepare
from grcsf_fast.inference.report import levels_on_grid
from grcsf_fast.networks.stream import Stream
from grcsf_fast.networks.whole_volume import reconstruct, reconstruction_stage, segment_views, segmentation_stage
from grcsf_fast.ops.backends import use_backend
from grcsf_fast.runtime.transfers import CPU, fetch, to_device, volumes_on

CLASSES = Labels(("core", "rim"), ((1,), (2,)))
REGIONS = Labels(("whole", "core"), ((1, 2), (2,)), exclusive=False)


def prepared_head(preprocessing=None):
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size) for size in (34, 40, 31)], indexing="ij")
    data = np.where(x**2 + y**2 + z**2 < 0.8, 60, 0) + 10 * noise(34, 40, 31)
    affine = np.array([[-4.0, 0, 0, 60], [0, 0, 4, -70], [0, -4, 0, 70], [0, 0, 0, 1]])
    volume = load_volume(nib.Nifti1Image(data.astype(np.float32), affine))
    return prepare(volume, preprocessing or Preprocessing(SPACING))


def bundle_of(kind):
    if kind == "windows":
        bundle = tiny_bundle()
        network = type(bundle.network)(3, 1, 1, features=(4, 8), patch_size=4, rcu_levels=(), residual_channels=4)
        return replace(
            bundle, network=network, mae=MaskedAutoencoder(3, 1, 4, 24, 1, 2, 24, 1, 2), roi_size=(16, 16, 16)
        )
    if kind == "neighbours":
        bundle = tiny_bundle(neighbours=1)
        return replace(bundle, mae=MaskedAutoencoder(2, 1, 8, 16, 1, 2, 16, 1, 2, neighbours=1))
    labels = {"classes": CLASSES, "regions": REGIONS}.get(kind)
    if labels is None:
        return tiny_bundle()
    bundle = tiny_bundle()
    arguments = bundle.network.config | {"out_channels": labels.outputs}
    return replace(bundle, network=type(bundle.network)(**arguments), labels=labels)


@pytest.mark.parametrize("kind", ["slices", "neighbours", "windows", "classes", "regions"])
@torch.no_grad()
def test_nobody_waits_from_the_prepared_volume_to_the_mask(kind):
    """Residual maps, views, networks, average, resampling and thresholds; slices or windows, one lesion or several."""
    bundle = bundle_of(kind)
    network, mae, labels = on_meta(bundle.network.eval()), on_meta(bundle.mae.eval()), bundle.labels
    prepared = prepared_head()
    prepared = replace(prepared, data=prepared.data.to(META))
    scales = (1.0,) if kind == "windows" else (1.0, 1.2)
    stages = segmentation_stage(network, 8, bundle.roi_size, labels=labels)
    stages |= reconstruction_stage(mae, network.spatial_dims, 8, bundle.residual_maps)

    def work():
        maps = yield from reconstruct(prepared.data, prepared.foreground, mae, bundle.residual_maps.mask_ratios)
        probability = yield from segment_views(
            prepared.data, prepared.foreground, maps, network, bundle.roi_size, True, scales, labels
        )
        return maps, probability, levels_on_grid(probability, prepared, 0.3, 0.5, labels)

    with use_backend("reference"), Watched() as watched:
        ((maps, probability, levels),) = together(Stream(stages), [work()])
    assert maps.device == probability.device == levels.reached.device == META
    assert levels.reached.shape == prepared.volume.data.shape[::-1]
    assert (levels.numbers is None) == (labels is None)
    # Which slices and windows hold head was decided on the processor.
    assert set(watched.waits) <= {"aten::nonzero", "aten::_local_scalar_dense"}
    assert watched.mixed == []


@pytest.mark.parametrize("modality", ["mri", "ct"])
def test_what_preparation_waits_for(modality):
    """The minimum, the object and the head's voxels; the percentiles are NumPy's on the processor."""
    with Watched() as watched:
        prepared = prepared_head(Preprocessing(SPACING, modality=modality, hu_window=(0.0, 80.0)))
    before_the_box = watched.waits[: watched.waits.index("aten::nonzero")]
    assert before_the_box == (["aten::_local_scalar_dense", "aten::index", "aten::index"] if modality == "mri" else [])
    assert prepared.foreground.device == prepared.data.device == CPU


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
