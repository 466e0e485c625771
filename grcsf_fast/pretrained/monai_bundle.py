"""A bundle of ours as a folder that MONAI's runner executes: ``python -m monai.bundle run``.

https://docs.monai.io/en/stable/mb_specification.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..data.files import allow_reading, replace_when_done
from ..errors import ArgumentError
from ..runtime.versions import versions
from .bundle import Bundle, BundleError, check_channels, check_is_bundle

__all__ = ["export_monai"]

FILES = ("models/model.pt", "configs/metadata.json", "configs/inference.json")
# Texts of a configuration that MONAI evaluates, replaces by another of its items or reads from a file.
EVALUATED = re.compile(r"[$@%].*|.*[@%]::.*", re.DOTALL)
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


def export_monai(bundle: Bundle, folder: str | Path) -> Path:
    """Write a bundle's weights and settings as a bundle of MONAI.

    MONAI reads and writes the volumes. What is between is :class:`grcsf_fast.inference.monai_inferer.VolumeInferer`,
    so grcsf_fast has to be installed where it runs.

    Args:
        bundle: with a network.
        folder: made if need be; files of the same names in it are replaced.

    Returns:
        The folder, with ``configs/inference.json``, ``configs/metadata.json`` and ``models/model.pt``.

    Raises:
        ArgumentError: the bundle holds an autoencoder alone.
        ArgumentTypeError: no bundle.
        BundleError: names of channels or labels that MONAI would evaluate, or a network that needs an autoencoder and
            has none.
        OSError: the folder cannot be written.
    """
    check_is_bundle(bundle)
    network = bundle.network
    if network is None:
        raise ArgumentError("bundle: expected a segmentation network, found an autoencoder alone; run train first")
    check_channels(bundle)
    for name in (*bundle.channels, *(bundle.labels.names if bundle.labels is not None else ())):
        if EVALUATED.fullmatch(name):
            raise BundleError(
                f"bundle: expected names that MONAI does not take for an expression or a reference when it reads its "
                f"configuration, without $, @ and % at the beginning and without @:: and %::, found {name!r}"
            )
    if network.rcu and network.requires_maps and bundle.mae is None:
        raise BundleError("bundle: its network was trained with residual maps, and it holds no autoencoder")
    folder = Path(folder)
    mae = bundle.mae if network.rcu else None
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("mae.")}
    if mae is not None:
        state |= {f"mae.{name}": tensor for name, tensor in mae.state_dict().items()}
    with replace_when_done(*(folder / file for file in FILES)) as (weights, metadata, inference):
        torch.save({name: tensor.detach().cpu() for name, tensor in state.items()}, weights)
        allow_reading(weights)
        metadata.write_text(json.dumps(_metadata(bundle), indent=4) + "\n")
        inference.write_text(json.dumps(_inference(bundle), indent=4) + "\n")
    return folder


def _inference(bundle: Bundle) -> dict[str, Any]:
    """Names that other bundles of MONAI use, so that their users know what to override."""
    assert bundle.network is not None
    network = {"_target_": "grcsf_fast.GRCSF", **bundle.network.config}
    if bundle.mae is not None and bundle.network.rcu:
        network["mae"] = {"_target_": "grcsf_fast.MaskedAutoencoder", **bundle.mae.config}
        network["residual_map_settings"] = asdict(bundle.residual_maps)
    predicted = "{'image': batch['image'], 'pred': @inferer(batch['image'], @network)}"
    several = len(bundle.channels) > 1
    return {
        "imports": [
            "$import os",  # this and glob are for expressions of the user's
            "$import glob",
            "$import torch",
            "$import monai",
            "$import grcsf_fast.inference.monai_inferer as monai_inferer",
        ],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "output_postfix": "seg",
        "datalist": f"$monai_inferer.list_images(@dataset_dir, {len(bundle.channels)})",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "checkpoint": "$@bundle_root + '/models/model.pt'",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader", "ensure_channel_first": True}
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': file} for file in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": "grcsf_fast.inference.monai_inferer.VolumeInferer",
            "preprocessing": bundle.preprocessing.as_json(),
            "residual_maps": asdict(bundle.residual_maps),
            "probability_threshold": bundle.probability_threshold,
            "hysteresis_threshold": bundle.hysteresis_threshold,
            "tta_flip": bundle.tta_flip,
            "tta_scales": bundle.tta_scales,
            "roi_size": bundle.roi_size,
            **({"above_hu": bundle.above_hu} if bundle.above_hu is not None else {}),
            **({"channels": bundle.channels} if several else {}),
            **({"labels": asdict(bundle.labels)} if bundle.labels is not None else {}),
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "@output_postfix",
                    "output_dtype": "$torch.uint8",
                    "resample": False,
                    "separate_folder": False,
                    **({"output_name_formatter": "$monai_inferer.name_of_case"} if several else {}),
                }
            ],
        },
        "initialize": [
            "$@network.load_state_dict(torch.load(@checkpoint, map_location=@device, weights_only=True))",
            "$@network.eval()",
        ],
        "run": [
            f"$[@postprocessing(case) for batch in @dataloader for case in monai.data.decollate_batch({predicted})]"
        ],
    }


def _metadata(bundle: Bundle) -> dict[str, Any]:
    found, labels = versions(), bundle.labels
    modalities = [bundle.preprocessing.of_channel(number).modality.upper() for number in range(len(bundle.channels))]
    formats = {"CT": "hounsfield", "MRI": "magnitude"}
    volume = {
        "modality": ", ".join(dict.fromkeys(modalities)),
        "spatial_shape": ["*", "*", "*"],
        "is_patch_data": False,
    }
    if labels is None:
        maps, most = ["lesion"], 1
    elif labels.exclusive:
        every = zip(labels.names, labels.numbers, strict=True)
        maps, most = [", ".join(["0 background", *(f"{number} {name}" for name, (number,) in every)])], labels.every[-1]
    else:
        maps, most = list(labels.names), 1
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by grcsf-fast {found['grcsf-fast']}"},
        "monai_version": found.get("monai", ""),
        "pytorch_version": found["torch"],
        "numpy_version": found["numpy"],
        "required_packages_version": {name: found[name] for name in ("grcsf-fast", "nibabel") if name in found},
        "name": "GRCSF lesion segmentation",
        "task": "Lesion segmentation",
        "description": "Lesion segmentation with global and regional feature compensation (GRCSF). Research software; "
        "not a medical device and not for clinical use.",
        "authors": "grcsf-fast",
        "copyright": f"{date.today().year}, see the licence of the weights",
        "intended_use": "Research only.",
        **bundle.hashes(),
        "network_data_format": {
            "inputs": {
                "image": {
                    **volume, "type": "image", "format": formats[modalities[0]] if len(set(modalities)) == 1 else "raw",
                    "dtype": "float32", "value_range": [], **_channels(bundle.channels),
                }
            },
            "outputs": {
                "pred": {
                    **volume, "type": "image", "format": "segmentation", "dtype": "uint8", "value_range": [0, most],
                    **_channels(maps),
                }
            },
        },
    }  # fmt: skip


def _channels(names: Sequence[str]) -> dict[str, Any]:
    return {"num_channels": len(names), "channel_def": {str(number): name for number, name in enumerate(names)}}
