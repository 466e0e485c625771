"""A trained model on disk: its networks, how volumes are prepared for them, and the thresholds of its masks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data.intensities import OPTIONAL
from ..data.labels import Labels
from ..data.volumes import Preprocessing
from ..errors import ArgumentError, ArgumentTypeError
from ..networks import arguments, weights
from ..networks.arguments import check_kinds, is_number, is_whole, short
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder
from ..networks.plain import unwrapped
from ..networks.weights import BundleError, ResidualMapSettings

__all__ = [
    "Bundle",
    "BundleError",
    "ResidualMapSettings",
    "check_channels",
    "check_is_bundle",
    "check_storable",
    "described_kind",
    "load_bundle",
    "read_channels",
    "read_config",
    "save_bundle",
]


MOST_SCALES = 16  # of views that are averaged
INTENSITIES = {"modality": arguments.TEXT, "percentiles": arguments.NUMBERS, "hu_window": arguments.NUMBERS}
# Of keys of config.json, by the object that they lie in; what Bundle checks itself is not among them.
KINDS: dict[str, dict[str, arguments.Kind]] = {
    "": {"preprocessing": arguments.OBJECT, "card": arguments.OBJECT, "weights_sha256": arguments.TEXT},
    "preprocessing": {
        **INTENSITIES,
        "spacing": arguments.NUMBERS,
        "others": arguments.OBJECTS,
        "constant_background": arguments.FLAG,
    },
    "labels": {"names": arguments.TEXTS, "exclusive": arguments.FLAG},
}
# Of arguments of Bundle; all but preprocessing may be None.
CLASSES = {
    "network": GRCSF,
    "mae": MaskedAutoencoder,
    "preprocessing": Preprocessing,
    "residual_maps": ResidualMapSettings,
    "labels": Labels,
}


@dataclass(frozen=True)
class Bundle:
    """Networks and settings of a trained model.

    Attributes:
        network: the segmentation network; None in a bundle of an autoencoder alone.
        mae: the masked autoencoder; None: the network's own, or none, for a network without RCU.
        preprocessing: of volumes.
        residual_maps: how they are made; by default as the network's own autoencoder would make them.
        probability_threshold: lesion where the probability is at least this.
        hysteresis_threshold: a connected lesion whose highest probability is below this is left out; 0: none is.
        tta_flip: the probability is averaged over the volume and its mirror image, left to right.
        tta_scales: the probability is averaged over the volume enlarged by these factors; in the slice, for 2-D
            networks.
        roi_size: edge lengths of a sliding window in voxels, for 3-D networks; None: the whole image at once.
        channels: names of the images of a case, in the order of the networks' channels.
        labels: that the network tells apart; None: lesion alone.
        card: free text and figures about the training.
        weights_sha256: hash of the weights' file that the bundle was read from; empty before saving. Networks that were
            exchanged or trained on since are not that file's: see :meth:`hashes`.
        read_values_sha256: of the networks as they were read from that file; set by :func:`load_bundle`.
        above_hu: lesion are only voxels whose value in the file, in Hounsfield units, is above this, of several
            channels that of the first; None: the probability alone decides. Connected lesions and what reaches the
            second threshold are of such voxels alone; the probability that is saved stays as it is.

    Raises:
        ArgumentError: thresholds, scales, a limit or a window that cannot be used, residual maps of other masking
            ratios than the network's, another autoencoder than its own, or one of other dimensions.
        ArgumentTypeError: networks, preprocessing, residual maps or labels of another class.
    """

    network: GRCSF | None
    mae: MaskedAutoencoder | None
    preprocessing: Preprocessing
    residual_maps: ResidualMapSettings = field(default_factory=lambda: cast("ResidualMapSettings", None))
    probability_threshold: float = 0.5
    hysteresis_threshold: float = 0.0
    tta_flip: bool = False
    tta_scales: tuple[float, ...] = (1.0,)
    roi_size: tuple[int, ...] | None = None
    channels: tuple[str, ...] = ("image",)
    labels: Labels | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""
    above_hu: float | None = None
    read_values_sha256: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name, kind in CLASSES.items():
            given = getattr(self, name)
            if not isinstance(given, kind) and (given is not None or name == "preprocessing"):
                which = kind.__name__ if name == "preprocessing" else f"{kind.__name__} or None"
                raise ArgumentTypeError(f"{name}: expected {which}, got {described_kind(given)}")
        network = self.network
        own = None if network is None else unwrapped(network.mae)
        if self.residual_maps is None:
            maps = ResidualMapSettings() if network is None else network.residual_map_settings
            object.__setattr__(self, "residual_maps", maps)
        if own is not None:
            if self.mae is None:
                object.__setattr__(self, "mae", own)
            elif self.mae is not own and not _same_weights(self.mae, own):
                same = self.mae.dtype == own.dtype
                got = "another one" if same else f"one in {self.mae.dtype} where the network's is in {own.dtype}"
                raise ArgumentError(f"mae: expected the network's own autoencoder, or none beside it, got {got}")
        dims = network.spatial_dims if network is not None and network.rcu else None
        if self.mae is not None and dims not in (None, self.mae.spatial_dims):
            raise ArgumentError(
                f"mae: expected an autoencoder of {dims} dimensions as the network is, got one of "
                f"{self.mae.spatial_dims}"
            )
        if network is not None and network.rcu and network.mask_ratios != self.residual_maps.mask_ratios:
            raise ArgumentError(
                f"residual_maps: expected the masking ratios {network.mask_ratios} of the network, got "
                f"{self.residual_maps.mask_ratios}"
            )
        for name in ("probability_threshold", "hysteresis_threshold"):
            if not _is_number(getattr(self, name), 0, 1):
                raise ArgumentError(f"{name}: expected a number from 0 to 1, got {short(getattr(self, name))}")
        if self.above_hu is not None:
            if not is_number(self.above_hu):
                raise ArgumentError(f"above_hu: expected a finite number, or None, got {short(self.above_hu)}")
            object.__setattr__(self, "above_hu", float(self.above_hu))
        if not isinstance(self.tta_flip, bool):
            raise ArgumentError(f"tta_flip: expected True or False, got {short(self.tta_flip)}")
        scales = self.tta_scales if isinstance(self.tta_scales, tuple | list) else ()
        if not 1 <= len(scales) <= MOST_SCALES or not all(_is_number(zoom, 0.25, 4) for zoom in scales):
            given = f"{MOST_SCALES} at most, got {short(self.tta_scales)}"
            raise ArgumentError(f"tta_scales: expected numbers from 0.25 to 4, {given}")
        texts = isinstance(self.channels, tuple | list) and all(isinstance(one, str) for one in self.channels)
        if not texts or not self.channels:
            raise ArgumentError(f"channels: expected names, got {short(self.channels)}")
        thresholds = {name: float(getattr(self, name)) for name in ("probability_threshold", "hysteresis_threshold")}
        named = {"tta_scales": tuple(map(float, scales)), "channels": tuple(self.channels)}
        if self.roi_size is not None:
            edges = self.roi_size if isinstance(self.roi_size, tuple | list) else ()
            if len(edges) not in (2, 3) or not all(is_whole(edge) and edge > 0 for edge in edges):
                raise ArgumentError(
                    f"roi_size: expected two or three edge lengths of 1 or more, or None, got {short(self.roi_size)}"
                )
            named["roi_size"] = tuple(map(int, edges))
        for name, value in (thresholds | named).items():  # numbers of NumPy, and what JSON has as lists
            object.__setattr__(self, name, value)

    def hashes(self) -> dict[str, str]:
        """Of the weights as they are now: ``"values_sha256"`` of their values, and ``"weights_sha256"`` of the file
        that holds them, empty where the bundle was read from none or its networks were exchanged or trained on since.
        """
        values = _values_sha256(self.network, self.mae)
        return {
            "weights_sha256": self.weights_sha256 if values == self.read_values_sha256 else "",
            "values_sha256": values,
        }


def _values_sha256(network: GRCSF | None, mae: MaskedAutoencoder | None) -> str:
    """Of all weights and buffers, with their names and dtypes."""
    found = hashlib.sha256()
    for module in (network, mae):
        if module is None:
            continue
        for name, tensor in module.state_dict().items():
            if module is network and name.startswith("mae."):  # its own autoencoder is the bundle's
                continue
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def check_is_bundle(bundle: Any, or_else: str = "") -> None:
    """See that an argument ``bundle`` is one.

    Args:
        bundle: the argument.
        or_else: what it may be besides, for the message.

    Raises:
        ArgumentTypeError: it is something else.
    """
    if not isinstance(bundle, Bundle):
        how = "; Bundle(network, mae, Preprocessing(spacing=...)) makes one of it"
        if isinstance(bundle, nn.Module):
            raise ArgumentTypeError(f"bundle: expected a bundle{or_else}, got a network{how}")
        how = "; load_bundle(...) reads one" if isinstance(bundle, str | Path) else ""
        raise ArgumentTypeError(f"bundle: expected a bundle{or_else}, got {described_kind(bundle)}{how}")


def described_kind(given: Any) -> str:
    """What an argument of a wrong class is, for a message."""
    if isinstance(given, str | Path):
        return repr(str(given))
    return "None" if given is None else type(given).__name__


def _is_number(value: Any, least: float, most: float) -> bool:
    return is_number(value) and least <= value <= most


def save_bundle(bundle: Bundle, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a bundle; an older one of the same name is replaced only when the new one is complete.

    A network that is stored with an autoencoder refuses to run without residual maps when it is loaded again.

    Args:
        bundle: what to write.
        folder: its folder.
        dtype: float64, float32, bfloat16 or float16, in which weights are stored; loading gives float32.

    Raises:
        ArgumentError: the folder holds something else than weights, which would be lost, or a network has other layers
            than its ``config`` describes.
        BundleError: networks of other channels or outputs than the bundle names.
        ArgumentTypeError: no bundle.
        OSError: the folder cannot be written.
    """
    check_is_bundle(bundle)
    check_channels(bundle)
    settings = {key: getattr(bundle, key) for key in _settings()}
    settings |= {"preprocessing": bundle.preprocessing.as_json(), "residual_maps": asdict(bundle.residual_maps)}
    settings["card"] = dict(bundle.card)
    # So that bundles of one channel and one kind of lesion stay as they always were.
    if len(bundle.channels) == 1:
        del settings["channels"]
    if bundle.above_hu is None:
        del settings["above_hu"]
    if bundle.labels is None:
        del settings["labels"]
    else:
        settings["labels"] = asdict(bundle.labels)
    if bundle.network is not None and bundle.mae is not None:
        settings["network"] = bundle.network.config | {"requires_maps": True}
    return weights.save_networks(folder, {"network": bundle.network, "mae": bundle.mae}, settings, dtype)


def load_bundle(name_or_folder: str | Path) -> Bundle:
    """Read a bundle; the networks are in evaluation mode, float32, on the CPU.

    Args:
        name_or_folder: a folder, or the name of a bundle in the package (``"demo"``).

    Raises:
        FileNotFoundError: no such bundle, or a file of it is missing.
        BundleError: unknown or missing keys, another format version, truncated or altered weights.
    """
    folder = weights.find_folder(name_or_folder)
    config = read_config(folder)
    networks = weights.load_networks(folder, config, {"network": GRCSF, "mae": MaskedAutoencoder})
    maps = weights.map_settings(folder, config)
    try:
        weights.check_keys(
            config["preprocessing"], [item.name for item in fields(Preprocessing) if item.name not in OPTIONAL]
        )
        if networks["network"] is not None:
            networks["network"].residual_map_settings = maps
        return Bundle(
            **networks,
            preprocessing=Preprocessing.from_json(config["preprocessing"]),
            residual_maps=maps,
            probability_threshold=config["probability_threshold"],
            hysteresis_threshold=config["hysteresis_threshold"],
            tta_flip=config["tta_flip"],
            tta_scales=config["tta_scales"],
            roi_size=config["roi_size"],
            channels=config["channels"],
            labels=Labels.from_json(config["labels"]) if config["labels"] is not None else None,
            card=config["card"],
            weights_sha256=config["weights_sha256"],
            above_hu=config["above_hu"],
            read_values_sha256=_values_sha256(**networks),
        )
    except weights.BAD_VALUES as error:
        raise BundleError(f"{folder / weights.CONFIG_NAME}: expected settings of a bundle: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The checked ``config.json`` of a bundle's folder; errors as for :func:`load_bundle`."""
    config = weights.read_config(folder, _settings())
    try:
        for name, kinds in KINDS.items():
            if not name or config[name] is not None:
                check_kinds(config[name] if name else config, kinds, name)
        for number, one in enumerate(config["preprocessing"].get("others", ())):
            check_kinds(one, INTENSITIES, f"preprocessing.others[{number}]")
    except ArgumentError as error:
        raise BundleError(f"{folder / weights.CONFIG_NAME}: {error}") from error
    return config


def read_channels(name_or_folder: str | Path) -> tuple[str, ...]:
    """The channels of a bundle without its weights; arguments and errors as for :func:`load_bundle`."""
    folder = weights.find_folder(name_or_folder)
    channels = read_config(folder)["channels"]
    if not channels or not arguments.TEXTS[1](channels):
        raise BundleError(f"{folder / weights.CONFIG_NAME}: expected names of channels, found {short(channels)}")
    return tuple(channels)


def check_channels(bundle: Bundle, name: str = "bundle") -> None:
    """See that networks and preprocessing have the channels and labels that the bundle names: else some would be lost
    in silence.

    Args:
        bundle: to check.
        name: for the message.

    Raises:
        BundleError: they have others.
    """
    named = {"in_channels": len(bundle.channels), "out_channels": 1 if bundle.labels is None else bundle.labels.outputs}
    given = 1 + len(bundle.preprocessing.others)
    if given not in (1, len(bundle.channels)):
        raise BundleError(f"{name}: expected intensities of {len(bundle.channels)} channels or of one, found {given}")
    for kind, module in (("network", bundle.network), ("mae", bundle.mae)):
        for channels, expected in named.items():
            found = module.config.get(channels, expected) if module is not None else expected
            if found != expected:
                what, how = ("channels", 'channels=("T1w", "FLAIR")') if channels == "in_channels" else (
                    "outputs of labels", "labels=Labels(names, numbers)"
                )  # fmt: skip
                raise BundleError(
                    f"{name}: expected {channels} {expected} of its {kind}, found {found}: that many {what} does the "
                    f"bundle name; Bundle(..., {how}) names others"
                )
    head = getattr(bundle.network.output, "weight", None) if bundle.network is not None else None
    if isinstance(head, Tensor) and len(head) != bundle.network.out_channels:
        raise BundleError(
            f"{name}: expected {bundle.network.out_channels} outputs of its network, as its config says, found "
            f"{len(head)}; for another number see GRCSF.from_pretrained"
        )


def check_storable(bundle: Bundle) -> None:
    """See that a bundle can be saved and loaded again, before anything is trained for it.

    Raises:
        BundleError: see :func:`check_channels`.
        ArgumentError: a network has other layers than its ``config`` describes.
    """
    check_channels(bundle, "run")
    for name in weights.NETWORKS:
        if (module := getattr(bundle, name)) is not None:
            weights.check_described(name, module)


def _same_weights(one: MaskedAutoencoder, other: MaskedAutoencoder) -> bool:
    """Also of a copy on another device, as a moving average has one."""
    first, second = one.state_dict(), other.state_dict()
    return one.config == other.config and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)


def _settings() -> list[str]:
    """The configuration beside networks and hash."""
    apart = (*weights.NETWORKS, "weights_sha256", "read_values_sha256")
    return [item.name for item in fields(Bundle) if item.name not in apart]
