"""A trained model on disk: a folder with ``config.json`` and ``model.safetensors``. No pickle anywhere.

``config.json`` holds everything needed to rebuild the networks and the preprocessing, and the hash of the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.files import allow_reading, check_writable
from ..data.volumes import Preprocessing
from ..errors import GrcsfError
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "BundleError",
    "ResidualMapSettings",
    "check_channels",
    "load_bundle",
    "save_bundle",
]

FORMAT = "grcsf-fast bundle"
FORMAT_VERSION = 2
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
PACKAGED = Path(__file__).parent / "bundles"


class BundleError(GrcsfError, ValueError):
    """A bundle that cannot be used; the message names the file, what was expected and what was found."""


@dataclass(frozen=True)
class ResidualMapSettings:
    """Arguments of :func:`grcsf_fast.residual_maps` that the network was trained with."""

    mask_ratios: tuple[float, ...] = (0.5, 0.75)
    rounds: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Bundle:
    """Networks and settings of a trained model.

    Attributes:
        network: the segmentation network; None in a bundle of an autoencoder alone.
        mae: the masked autoencoder; None for a network without RCU.
        preprocessing: of volumes.
        residual_maps: how they are made.
        probability_threshold: lesion where the probability is at least this.
        hysteresis_threshold: a connected lesion whose highest probability is below this is left out; 0: none is.
        tta_flip: the probability is averaged over the volume and its mirror image, left to right.
        tta_scales: the probability is averaged over the volume enlarged by these factors; in the slice, for 2-D
            networks.
        roi_size: edge lengths of a sliding window in voxels, for 3-D networks; None: the whole image at once.
        card: free text and figures about the training.
        weights_sha256: hash of the weights' file; empty before saving.
    """

    network: GRCSF | None
    mae: MaskedAutoencoder | None
    preprocessing: Preprocessing
    residual_maps: ResidualMapSettings = ResidualMapSettings()
    probability_threshold: float = 0.5
    hysteresis_threshold: float = 0.0
    tta_flip: bool = False
    tta_scales: tuple[float, ...] = (1.0,)
    roi_size: tuple[int, ...] | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""


def save_bundle(bundle: Bundle, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a bundle; an older one under the same name is replaced only when the new one is complete.

    Args:
        bundle: what to write.
        folder: its folder.
        dtype: floating-point tensors are stored in it; loading gives float32.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    check_writable(folder.parent).mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".partial-{os.getpid()}-{folder.name}")
    old = folder.with_name(f".old-{os.getpid()}-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        part.mkdir()
        tensors = {
            f"{prefix}.{name}": tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
            for prefix, module in _modules(bundle).items()
            for name, tensor in _state(module).items()
        }
        save_file(tensors, part / WEIGHTS_NAME)
        allow_reading(part / WEIGHTS_NAME)
        config = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "network": bundle.network.config if bundle.network is not None else None,
            "mae": bundle.mae.config if bundle.mae is not None else None,
            "preprocessing": asdict(bundle.preprocessing),
            "residual_maps": asdict(bundle.residual_maps),
            "probability_threshold": bundle.probability_threshold,
            "hysteresis_threshold": bundle.hysteresis_threshold,
            "tta_flip": bundle.tta_flip,
            "tta_scales": bundle.tta_scales,
            "roi_size": bundle.roi_size,
            "card": dict(bundle.card),
            "weights_sha256": _sha256(part / WEIGHTS_NAME),
        }
        (part / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        try:
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
        except BaseException:  # a signal too
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except SafetensorError as error:
        raise OSError(f"{folder}: could not be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def load_bundle(name_or_folder: str | Path) -> Bundle:
    """Read a bundle; the networks are in evaluation mode, float32, on the CPU.

    Args:
        name_or_folder: a folder, or the name of a bundle in the package (``"demo"``).

    Raises:
        FileNotFoundError: no such bundle, or a file of it is missing.
        BundleError: unknown or missing keys, another format version, truncated or altered weights.
    """
    folder = Path(name_or_folder)
    # A folder of the packaged name that holds no bundle, such as the output of `make demo`, is not meant.
    if not (folder / CONFIG_NAME).is_file() and (PACKAGED / str(name_or_folder) / CONFIG_NAME).is_file():
        folder = PACKAGED / str(name_or_folder)
    if not folder.is_dir():
        packaged = sorted(path.name for path in PACKAGED.glob("*") if path.is_dir())
        found = "a file" if folder.exists() else "neither"
        raise FileNotFoundError(f"{name_or_folder}: expected a bundle's folder or one of {packaged}, found {found}")
    config = read_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: expected the bundle's weights, found no file")
    found = _sha256(weights)
    if found != config["weights_sha256"]:
        raise BundleError(
            f"{weights}: expected a file with SHA-256 {config['weights_sha256']}, found {found}: "
            f"truncated or altered ({weights.stat().st_size} bytes)"
        )
    try:
        bundle = Bundle(
            network=_build(GRCSF, config["network"]),
            mae=_build(MaskedAutoencoder, config["mae"]),
            preprocessing=Preprocessing(**_tuples(config["preprocessing"])),
            residual_maps=ResidualMapSettings(**_tuples(config["residual_maps"])),
            probability_threshold=float(config["probability_threshold"]),
            hysteresis_threshold=float(config["hysteresis_threshold"]),
            tta_flip=bool(config["tta_flip"]),
            tta_scales=_scales(config["tta_scales"]),
            roi_size=tuple(config["roi_size"]) if config["roi_size"] is not None else None,
            card=config["card"],
            weights_sha256=found,
        )
    # Values of a wrong kind surface as any of these from the networks' constructors.
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise BundleError(f"{folder / CONFIG_NAME}: expected values that build the networks: {error}") from error
    _load_weights(weights, bundle)
    return bundle


def check_channels(bundle: Bundle, name: str = "bundle") -> None:
    """See that the networks are for one image and one kind of lesion: volumes of several are not read yet.

    Args:
        bundle: to check.
        name: for the message.

    Raises:
        BundleError: a network has several channels.
    """
    for kind, module in _modules(bundle).items():
        for channels in ("in_channels", "out_channels"):
            found = module.config.get(channels, 1)
            if found != 1:
                raise BundleError(f"{name}: expected {channels} 1 of its {kind}, found {found}; only one is supported")


def _build(kind: type[nn.Module], settings: Mapping[str, Any] | None) -> nn.Module | None:
    """The network, if there is one, in float32 on the CPU whatever PyTorch's defaults."""
    if settings is None:
        return None
    with torch.device("cpu"):
        return kind(**settings).float()


def _modules(bundle: Bundle) -> dict[str, nn.Module]:
    modules = {"network": bundle.network, "mae": bundle.mae}
    return {name: module for name, module in modules.items() if module is not None}


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own tensors: an autoencoder inside the network is stored once, as the bundle's."""
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("mae.")}


def read_config(folder: Path) -> dict[str, Any]:
    """The checked ``config.json`` of a bundle's folder; errors as for :func:`load_bundle`."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the bundle's configuration, found no file")
    try:
        config = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path}: expected JSON, could not read it: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError(f'{path}: expected "format": "{FORMAT}", found {_short(config)}')
    if config.get("version") == 1:
        config = _from_version_1(config)
    if config.get("version") != FORMAT_VERSION:
        raise BundleError(f"{path}: expected format version 1 or {FORMAT_VERSION}, found {config.get('version')!r}")
    expected = {item.name for item in fields(Bundle)} | {"format", "version"}
    if unknown := sorted(set(config) - expected):
        raise BundleError(f"{path}: unknown keys {unknown}; expected {sorted(expected)}")
    if missing := sorted(expected - set(config)):
        raise BundleError(f"{path}: missing keys {missing}")
    return config


def _from_version_1(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in today's names."""
    names = {
        "residual": "residual_maps", "lesion_peak": "hysteresis_threshold", "mirror": "tta_flip", "zooms": "tta_scales",
        "window": "roi_size",
    }  # fmt: skip
    inner = {"residual": {"ratios": "mask_ratios"}, "network": {"threshold": "importance_threshold"}}
    found = dict(config) | {"version": FORMAT_VERSION}
    for part, renamed in inner.items():
        if isinstance(found.get(part), dict):
            found[part] = {renamed.get(key, key): value for key, value in found[part].items()}
    return {names.get(key, key): value for key, value in found.items()}


def _load_weights(path: Path, bundle: Bundle) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise BundleError(f"{path}: expected safetensors, could not read it: {error}") from error
    # The last convolution's name in version 1.
    tensors = {re.sub(r"^network\.head\.", "network.output.", name): tensor for name, tensor in tensors.items()}
    modules = _modules(bundle)
    expected = {f"{prefix}.{name}" for prefix, module in modules.items() for name in _state(module)}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise BundleError(f"{path}: expected the tensors that config.json describes; {len(odd)} differ, as {odd[0]}")
    for prefix, module in modules.items():
        state = {name: tensors[f"{prefix}.{name}"] for name in _state(module)}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise BundleError(f"{path}: {error}") from error
        module.eval()


def _scales(values: Any) -> tuple[float, ...]:
    tta_scales = tuple(float(value) for value in values)
    if not tta_scales or not all(0.25 <= zoom <= 4 for zoom in tta_scales):
        raise ValueError(f"tta_scales: expected numbers from 0.25 to 4, got {values}")
    return tta_scales


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
