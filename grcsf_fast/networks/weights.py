"""Networks on disk: a folder with ``config.json`` and ``model.safetensors``. No pickle anywhere.

``config.json`` holds what rebuilds the networks and the hash of the weights. A bundle is such a folder that also says
how volumes are prepared for the networks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data.files import allow_reading, check_writable
from ..data.reports import read_json
from ..errors import ArgumentError, GrcsfError
from .arguments import KINDS_OF_MAE, KINDS_OF_MAPS, KINDS_OF_NETWORK, check_kinds, checked_config, is_whole, short

__all__ = [
    "BundleError",
    "ResidualMapSettings",
    "as_map_settings",
    "check_described",
    "check_keys",
    "find_folder",
    "load_networks",
    "map_settings",
    "read_config",
    "save_networks",
    "tuples",
]

FORMAT = "grcsf-fast bundle"
FORMAT_VERSION = 3
CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
OF_FILE_BROWSERS = (".DS_Store", "Thumbs.db")  # which lie wherever a person has looked
PACKAGED = Path(__file__).parents[1] / "pretrained" / "bundles"
NETWORKS = ("network", "mae")
KEYS = ("format", "version", *NETWORKS, "residual_maps", "weights_sha256")
UNSAID = {"channels": ["image"], "labels": None, "above_hu": None}
# What values of a wrong kind raise in the constructors.
BAD_VALUES = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError)
STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_RATIOS = 64


class BundleError(GrcsfError, ValueError):
    """A folder of weights that cannot be used; the message names the file, what was expected and what was found."""


@dataclass(frozen=True)
class ResidualMapSettings:
    """Arguments of :func:`grcsf_fast.residual_maps` that a network was trained with.

    Attributes:
        mask_ratios: fractions of the patches that are hidden, one per map.
        rounds: maskings averaged.
        seed: of the masks.
        signed: image minus reconstruction; False: its absolute value.
    """

    mask_ratios: tuple[float, ...] = (0.5, 0.75)
    rounds: int = 1
    seed: int = 0
    signed: bool = True

    def __post_init__(self) -> None:
        plain = checked_config(KINDS_OF_MAPS, **vars(self))
        if len(plain["mask_ratios"]) > MOST_RATIOS:
            raise ArgumentError(f"mask_ratios: expected {MOST_RATIOS} at most, got {len(plain['mask_ratios'])}")
        for name, value in tuples(plain).items():
            object.__setattr__(self, name, value)


def save_networks(
    folder: str | Path, networks: Mapping[str, nn.Module | None], settings: Mapping[str, Any], dtype: torch.dtype
) -> Path:
    """Write networks; an older folder of weights is replaced only when the new one is complete.

    Args:
        folder: where to: a new one, an empty one, or one of weights and nothing else.
        networks: by ``"network"`` and ``"mae"``; None: there is none.
        settings: the configuration beside them, ready for JSON.
        dtype: floating-point tensors are stored in it, one of ``STORED``; loading gives float32.

    Raises:
        ArgumentError: there is a file, a folder that holds something else, or the one that the program is in; another
            dtype; or a network has other weights than its ``config`` describes.
        OSError: the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if dtype not in STORED:
        raise ArgumentError(f"dtype: expected one of {', '.join(map(str, STORED))}, got {dtype!r}")
    for name, module in networks.items():
        if module is not None:
            check_described(name, module)

    # A link goes on leading to where the weights are, and "a/../b" is b before there is an a, too.
    given, folder = Path(folder), Path(os.path.realpath(folder))
    _check_replaceable(folder)
    check_writable(folder.parent).mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".partial-{os.getpid()}-{folder.name}")
    old = folder.with_name(f".old-{os.getpid()}-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        part.mkdir()
        tensors = {
            f"{prefix}.{name}": tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
            for prefix, module in networks.items()
            for name, tensor in _state(module).items()
        }
        save_file(tensors, part / WEIGHTS_NAME)
        allow_reading(part / WEIGHTS_NAME)
        config = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            **{name: module.config if module is not None else None for name, module in networks.items()},
            **settings,
            "weights_sha256": _sha256(part / WEIGHTS_NAME),
        }
        (part / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        for path in part.iterdir():  # before the names are right: a machine may lose its power
            with path.open("r+b") as written:  # Windows wants it open for writing
                os.fsync(written.fileno())
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
    return given


def check_described(name: str, module: nn.Module) -> None:
    """See that the configuration builds a network of these weights: else what is saved could not be loaded.

    Raises:
        ArgumentError: it does not; the message names the first weight that differs.
    """
    assert isinstance(module.config, dict)  # of every module that is saved
    with torch.device("meta"):
        built = type(module)(**module.config)
    expected, found = ({key: tuple(value.shape) for key, value in _state(one).items()} for one in (built, module))
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise ArgumentError(
                f"{name}.{key}: expected {expected.get(key, 'no such weights')}, as {name}.config builds it, got "
                f"{found.get(key, 'none')}: a layer that was exchanged cannot be saved; for another number of channels "
                "or outputs see GRCSF.from_pretrained"
            )


def _check_replaceable(folder: Path) -> None:
    """See that nothing but older weights is lost with a folder."""
    if not folder.exists():
        return
    if folder.samefile(os.curdir):
        raise ArgumentError(f"{folder}: expected another folder than the one that the program is in")
    expected = f"{folder}: expected no such folder, an empty one or one of weights alone, to be replaced"
    if not folder.is_dir():
        raise ArgumentError(f"{expected}, found a file")
    held = {path.name for path in folder.iterdir()}
    if others := sorted(held - {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, *OF_FILE_BROWSERS}):
        raise ArgumentError(f"{expected}, found {others[0]} in it, which would be lost; choose a folder of its own")
    if held - set(OF_FILE_BROWSERS):
        try:
            config = json.loads((folder / CONFIG_NAME).read_text())
        except (OSError, ValueError):
            config = None
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise ArgumentError(f"{expected}, found files of something else, which would be lost")


def find_folder(name_or_folder: str | Path) -> Path:
    """A folder of weights, or that of the package by its name (``"demo"``).

    Raises:
        FileNotFoundError: neither is there.
    """
    folder = Path(name_or_folder)
    # A folder of the packaged name that holds no weights, such as the output of `make demo`, is not meant.
    if not (folder / CONFIG_NAME).is_file() and (PACKAGED / str(name_or_folder) / CONFIG_NAME).is_file():
        folder = PACKAGED / str(name_or_folder)
    if not folder.is_dir():
        packaged = sorted(path.name for path in PACKAGED.glob("*") if path.is_dir())
        found = "a file" if folder.exists() else "neither"
        raise FileNotFoundError(f"{name_or_folder}: expected a bundle's folder or one of {packaged}, found {found}")
    return folder


def read_config(folder: Path, settings: Collection[str] | None = None) -> dict[str, Any]:
    """The checked ``config.json`` of a folder, in today's names.

    Args:
        folder: from :func:`find_folder`.
        settings: keys that have to be there beside those of the networks, and no others; None: any may.

    Raises:
        FileNotFoundError: no such file.
        BundleError: no JSON, another format or version, unknown or missing keys.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the bundle's configuration, found no file")
    try:
        config = read_json(path)
    except ValueError as error:
        raise BundleError(f"{path}: expected JSON, could not read it: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError(f'{path}: expected "format": "{FORMAT}", found {short(config)}')
    for version, newer in ((1, _from_version_1), (2, _from_version_2)):
        if is_whole(config.get("version")) and config["version"] == version:
            config = newer(config)
    if config.get("version") != FORMAT_VERSION:
        raise BundleError(
            f"{path}: expected a format version from 1 to {FORMAT_VERSION}, found {config.get('version')!r}"
        )
    expected = {*KEYS, *(settings or ())}
    # Those of one channel and one kind of lesion say neither, as they always did.
    config = {name: value for name, value in UNSAID.items() if name in expected} | config
    if settings is not None and (unknown := sorted(set(config) - expected)):
        raise BundleError(f"{path}: unknown keys {unknown}; expected {sorted(expected)}")
    if missing := sorted(expected - set(config)):
        alone = "; save_pretrained stores networks alone, read them with from_pretrained"
        raise BundleError(f"{path}: missing keys {missing}" + (alone if set(KEYS) <= set(config) else ""))
    if isinstance(config["network"], dict):
        # Networks from before this was a choice were trained with residual maps.
        config["network"].setdefault("requires_maps", True)
    return config


def _from_version_1(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "residual": "residual_maps", "lesion_peak": "hysteresis_threshold", "mirror": "tta_flip", "zooms": "tta_scales",
        "window": "roi_size",
    }  # fmt: skip
    inner = {"residual": {"ratios": "mask_ratios"}, "network": {"threshold": "importance_threshold"}}
    found: dict[str, Any] = {**config, "version": 2}
    for part, renamed in inner.items():
        if isinstance(found.get(part), dict):
            found[part] = {renamed.get(key, key): value for key, value in found[part].items()}
    return {names.get(key, key): value for key, value in found.items()}


def _from_version_2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Networks had another form of the GCU then, autoencoders another decoder, and residual maps no sign."""
    former = {"network": {"gcu_form": "scale"}, "residual_maps": {"signed": False}, "mae": {"decoder": "self"}}
    found = dict(config) | {"version": FORMAT_VERSION}
    for part, values in former.items():
        if isinstance(found.get(part), dict):
            found[part] = values | found[part]
    return found


def load_networks(
    folder: Path, config: Mapping[str, Any], kinds: Mapping[str, type[nn.Module]]
) -> dict[str, nn.Module | None]:
    """Networks of a folder in evaluation mode, float32, on the CPU.

    Args:
        folder: from :func:`find_folder`.
        config: from :func:`read_config`.
        kinds: classes of the networks that are wanted, by ``"network"`` and ``"mae"``.

    Returns:
        A network for each key of ``kinds``, or None where the folder holds none.

    Raises:
        FileNotFoundError: the weights are missing.
        BundleError: truncated or altered weights, or a configuration that does not fit them.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the bundle's weights, found no file")
    found = _sha256(path)
    if found != config["weights_sha256"]:
        raise BundleError(
            f"{path}: expected a file with SHA-256 {config['weights_sha256']}, found {found}: "
            f"truncated or altered ({path.stat().st_size} bytes)"
        )
    try:
        for name, kind in kinds.items():
            if config[name] is not None:
                check_kinds(config[name], KINDS_OF_MAE if name == "mae" else KINDS_OF_NETWORK, name)
            _check_size(path, name, kind, config[name])
        networks = {name: _build(kind, config[name]) for name, kind in kinds.items()}
    except BundleError:
        raise
    except BAD_VALUES as error:
        raise BundleError(f"{folder / CONFIG_NAME}: expected values that build the networks: {error}") from error
    _load_weights(path, networks)
    return networks


class _SizesAlone(TorchFunctionMode):
    """For networks without memory: random numbers and products there have PyTorch import its compiler, for a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.mul:
            return args[0]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def _check_size(path: Path, name: str, kind: type[nn.Module], settings: Mapping[str, Any] | None) -> None:
    """See that a network as the configuration has it is about as large as its weights, before memory is taken.

    Raises:
        BundleError: it is much larger.
    """
    from safetensors import SafetensorError, safe_open

    if settings is None:
        return
    try:
        with safe_open(path, "pt") as file:
            names = [one for one in file.keys() if one.startswith(f"{name}.")]  # noqa: SIM118 - no mapping
            stored = [math.prod(file.get_slice(one).get_shape()) for one in names]
    except SafetensorError as error:
        raise BundleError(f"{path}: expected safetensors, could not read it: {error}") from error
    # Of what is made one by one, each has a tensor; the rest costs nothing on a device without memory.
    layers = [settings[key] for key in settings if key.endswith("depth")] + [len(settings.get("features", ()))]
    numbers = None
    if all(isinstance(one, int) and one <= len(stored) for one in layers):
        with _SizesAlone():
            network = _build(kind, settings, "meta")
        numbers = sum(tensor.numel() for tensor in _state(network).values())
    if numbers is None or numbers > 2 * sum(stored) + 1000:
        raise BundleError(
            f"{path}: expected the tensors that config.json describes; {name} there has {numbers or 'more'} numbers, "
            f"here {sum(stored)} in {len(stored)} tensors"
        )


def _build(kind: type[nn.Module], settings: Mapping[str, Any] | None, device: str = "cpu") -> nn.Module | None:
    """The network, if there is one, in float32 on the device whatever PyTorch's defaults."""
    if settings is None:
        return None
    with torch.device(device):
        return kind(**settings).float()


def _state(module: nn.Module | None) -> dict[str, Tensor]:
    """The module's own tensors: an autoencoder inside the network is stored once, under its own name."""
    state = module.state_dict() if module is not None else {}
    return {name: tensor for name, tensor in state.items() if not name.startswith("mae.")}


def _load_weights(path: Path, networks: Mapping[str, nn.Module | None]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise BundleError(f"{path}: expected safetensors, could not read it: {error}") from error
    # The last convolution's name in version 1.
    tensors = {re.sub(r"^network\.head\.", "network.output.", name): tensor for name, tensor in tensors.items()}
    unwanted = {name for name in NETWORKS if name not in networks}
    tensors = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] not in unwanted}
    expected = {f"{prefix}.{name}" for prefix, module in networks.items() for name in _state(module)}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise BundleError(f"{path}: expected the tensors that config.json describes; {len(odd)} differ, as {odd[0]}")
    for prefix, module in networks.items():
        if module is None:
            continue
        own = _state(module)
        state = {name: tensors[f"{prefix}.{name}"] for name in own}
        for name, tensor in state.items():
            if tensor.dtype not in (STORED if own[name].is_floating_point() else (own[name].dtype,)):
                raise BundleError(
                    f"{path}: expected numbers like {own[name].dtype} of {prefix}.{name}, found {tensor.dtype}"
                )
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise BundleError(f"{path}: {error}") from error
        module.eval()


def as_map_settings(
    given: ResidualMapSettings | Mapping[str, Any] | None, mask_ratios: tuple[float, ...]
) -> ResidualMapSettings:
    """How residual maps are made, of what a network's constructor gets.

    Raises:
        ArgumentError: other settings, or other masking ratios than the network's.
    """
    if given is None:
        return ResidualMapSettings(mask_ratios)
    try:
        whole = isinstance(given, ResidualMapSettings)
        found = given if whole else ResidualMapSettings(**{"mask_ratios": mask_ratios, **tuples(given)})
    except TypeError as error:
        raise ArgumentError(f"residual_map_settings: expected those of residual maps, got {given!r}") from error
    if tuple(found.mask_ratios) != tuple(mask_ratios):
        raise ArgumentError(
            f"residual_map_settings: expected the masking ratios {mask_ratios} of the network, got {found.mask_ratios}"
        )
    return found


def map_settings(folder: Path, config: Mapping[str, Any]) -> ResidualMapSettings:
    """How residual maps were made for the networks; errors as for :func:`load_networks`."""
    try:
        check_kinds(config["residual_maps"], KINDS_OF_MAPS, "residual_maps")
        check_keys(config["residual_maps"], [item.name for item in fields(ResidualMapSettings)])
        return ResidualMapSettings(**tuples(config["residual_maps"]))
    except BAD_VALUES as error:
        raise BundleError(f"{folder / CONFIG_NAME}: expected settings of residual maps: {error}") from error


def check_keys(values: Mapping[str, Any], expected: Collection[str]) -> None:
    """See that no setting is missing, whose default would stand in for it in silence.

    Raises:
        ValueError: one is.
    """
    if missing := [key for key in expected if key not in values]:
        raise ValueError(f"missing keys {missing}")


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a dataclass from JSON, which knows lists alone."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
