"""How the folders beside this file were made, by commit ab34de1, the last one that wrote bundles of version 1.

It runs there alone, as the names it imports are those of that commit: from the root of a worktree of it,
``PYTHONPATH=. python make.py FOLDER``.
"""

# ruff: noqa: E402
import sys

sys.modules["grcsf_fast.kernels"] = None  # plain PyTorch, whatever kernels are installed

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import save_file

from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.inference.predictor import Predictor
from grcsf_fast.networks.grcsf import GRCSF
from grcsf_fast.networks.mae import MaskedAutoencoder
from grcsf_fast.pretrained.bundle import Bundle, ResidualSettings, load_bundle, save_bundle


def scan(shape, affine, air, tissue, spread, seed):
    """A noisy ellipsoid with a bright spot."""
    random = np.random.default_rng(seed)
    places = (np.indices(shape).T - (np.array(shape) - 1) / 2) / (np.array(shape) / 2)
    noise = spread * random.standard_normal(shape)
    values = np.where(((places**2).sum(-1) < 0.8).T, tissue + noise, air + np.abs(noise) / 10)
    values[(((places - [0.3, -0.2, 0.1]) ** 2).sum(-1) < 0.06).T] += 4 * spread
    return nib.Nifti1Image(np.rint(values).astype(np.int16), affine)


def predicted(bundle, image):
    return Predictor(bundle, device="cpu", backend="reference", precision="float32")(image)


def thresholds(probability):
    """Two that few voxels reach, as far from every voxel as they can be, so that rounding decides nothing."""
    inside = probability[probability > 0]
    for share in (0.85, 0.985):
        values = np.quantile(inside, np.linspace(share - 0.02, share + 0.01, 200))
        yield max(np.round(values, 4).tolist(), key=lambda value: np.abs(probability - value).min())


@torch.no_grad()
def make(folder, network, mae, preprocessing, image, **settings):
    for parameter in [*network.parameters(), *(mae.parameters() if mae is not None else [])]:
        parameter.mul_(1.5)
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    bundle = Bundle(network.eval(), mae, preprocessing, **settings, card={"made_by": "a test"})
    low, high = thresholds(np.asarray(predicted(bundle, image).probability.dataobj))
    settings |= {"probability_threshold": low, "lesion_peak": high}
    save_bundle(Bundle(network, mae, preprocessing, **settings, card={"made_by": "a test"}), folder)
    found = predicted(load_bundle(folder), image)
    named = {key if isinstance(key, str) else f"residual{100 * key:.0f}": one for key, one in found.values.items()}
    named |= {"image": torch.from_numpy(np.asarray(image.dataobj)), "affine": torch.from_numpy(image.affine)}
    named["mask"] = torch.from_numpy(np.ascontiguousarray(found.mask.dataobj))
    save_file({name: one.contiguous() for name, one in named.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.manual_seed(0)
    turn = nib.eulerangles.euler2mat(0.1, 0.05, -0.08)
    make(
        target / "slices",
        GRCSF(2, 1, 1, (4, 6), patch_size=4, residual_channels=4, rcu_levels=(0,), threshold=0.1),
        MaskedAutoencoder(
            patch_size=4, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_num_heads=2
        ),
        Preprocessing((2.5, 2.5, 6.0)),
        scan((38, 46, 5), nib.affines.from_matvec(turn @ np.diag([-2.0, 2.0, 6.0]), [30, -40, -20]), 0, 100, 15, 0),
        residual=ResidualSettings((0.5, 0.75), rounds=2, seed=5), mirror=True, zooms=(1.0, 1.1),
    )  # fmt: skip
    torch.manual_seed(1)
    make(
        target / "windows",
        GRCSF(3, 1, 1, (4, 6), rcu_levels=(), downsample="conv"),
        None,
        Preprocessing((3.0, 3.0, 3.0), "ct", hu_window=(0.0, 80.0), margin=1),
        scan((24, 27, 11), np.diag([3.0, 3.0, 3.5, 1.0]), -1000, 40, 15, 1),
        window=(16, 16, 8), mirror=True,
    )  # fmt: skip
