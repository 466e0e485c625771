"""What a file claims is compared with the memory there is."""

import nibabel as nib
import numpy as np
import pytest

from grcsf_fast.data import images
from grcsf_fast.data.images import open_image
from grcsf_fast.data.masks import read_masks
from grcsf_fast.data.volumes import VolumeError


@pytest.mark.parametrize("slope", [None, 0.5])
def test_what_a_header_claims_is_compared_with_memory(tmp_path, monkeypatch, slope):
    image = nib.Nifti1Image(np.ones((9, 8, 7), np.int16), np.eye(4))
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    nib.save(image, tmp_path / "a.nii.gz")
    opened = open_image(tmp_path / "a.nii.gz")
    needed = 9 * 8 * 7 * (2 + 3 + (0 if slope is None else 8))
    assert images.bytes_to_read(opened) == needed
    monkeypatch.setattr(images, "memory_budget", lambda: 2 * needed)
    images.check_memory(opened, opened)
    monkeypatch.setattr(images, "memory_budget", lambda: 2 * needed - 1)
    with pytest.raises(
        VolumeError, match=r"expected voxels that memory has room for, .* with the other files of its case"
    ):
        images.check_memory(opened, opened)
    monkeypatch.setattr(images, "memory_budget", lambda: needed - 1)
    with pytest.raises(VolumeError, match=r"found shape \(9, 8, 7\), which takes \S+ GiB$"):
        read_masks([tmp_path / "a.nii.gz"])
