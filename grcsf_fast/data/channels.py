"""Images of several channels: one file per channel as nnU-Net names them, or one file whose fourth axis they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ..errors import ArgumentError
from .files import CHANNEL, case_name, find_cases, left_out, named_files
from .images import OneChannel, VolumeError, examine
from .masks import Mask, check_grid
from .volumes import Preprocessing, Volume, bytes_needed, load_volume

__all__ = ["Channels", "as_channels", "find_images", "image_bytes", "load_image", "parts_of", "several"]

Part = str | Path | OneChannel | nib.Nifti1Image


@dataclass(frozen=True)
class Channels:
    """The images of a case, one per channel, on one grid.

    Attributes:
        case: for messages.
        images: in the order of the channels.
        names: of the channels, where they are known.
    """

    case: str
    images: tuple[Any, ...]
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.images[0]} and {len(self.images) - 1} more"

    def called(self, number: int) -> str:
        """A channel in a message."""
        return f"channel {number} ({self.names[number]})" if number < len(self.names) else f"channel {number}"


def parts_of(source: Any) -> tuple[Any, ...]:
    """The images of a source: itself, or one per channel."""
    return source.images if isinstance(source, Channels) else (source,)


def load_image(source: Part | Channels) -> Volume:
    """Read and check a volume of one channel, or of several.

    Returns:
        The volume; the channels after the first are its ``others``.

    Raises:
        VolumeError: as :func:`load_volume`, or a channel on another grid than the first; the message names case and
            channel.
        FileNotFoundError: a channel is missing; the message names case and channel.
    """
    if not isinstance(source, Channels):
        return load_volume(source)
    for number, image in enumerate(source.images):
        file = image.path if isinstance(image, OneChannel) else image
        if isinstance(file, str | Path) and not Path(file).exists():
            raise FileNotFoundError(f"{source.case}: expected {source.called(number)} in {file}, found no file")
    volumes = []
    for number, image in enumerate(source.images):
        try:
            volume = load_volume(image)
            if volumes:
                nothing = Mask(np.broadcast_to(np.False_, volume.data.shape), volume.affine, volume.name, ())
                check_grid(nothing, volumes[0].name, volumes[0].data.shape, volumes[0].affine)
        except VolumeError as error:
            raise VolumeError(f"{source.case}: {source.called(number)}: {error}") from error
        volumes.append(volume)
    first, *others = volumes
    remarks = [f"{source.called(number)}: {one}" for number, volume in enumerate(volumes) for one in volume.remarks]
    return replace(first, others=tuple(volume.data for volume in others), remarks=tuple(remarks))


def image_bytes(source: Part | Channels, preprocessing: Preprocessing, a_voxel: float) -> int:
    """As :func:`bytes_needed`, of one channel or of several."""
    parts = parts_of(source)
    return sum(bytes_needed(image, preprocessing, a_voxel / len(parts)) for image in parts)


def as_channels(source: Any, count: int) -> Any:
    """A source for networks of so many channels.

    Args:
        source: images in a list or tuple, a file with the channels as its fourth axis, the file ``NAME_0000`` beside
            ``NAME_0001`` and so on, or a 4-D nibabel image; of one channel what :func:`load_volume` takes.
        count: of channels.

    Returns:
        The source itself where ``count`` is 1, else :class:`Channels`.

    Raises:
        ArgumentError: another number of images.
        VolumeError: a file that cannot be read, or has another number of channels.
        FileNotFoundError: a file of a channel is missing.
    """
    if isinstance(source, list | tuple):
        names = [case_name(image) for image in source if isinstance(image, str | Path)]
        source = Channels(names[0] if names else "volume", tuple(source))
    if isinstance(source, Channels):
        if len(source.images) != count:
            listed = f" ({', '.join(source.names)})" if source.names else ""
            raise ArgumentError(
                f"{source.case}: expected {count} channel{'s' * (count > 1)}, as the networks take, "
                f"got {len(source.images)}{listed}"
            )
        return source if count > 1 else source.images[0]
    if count == 1:
        return source
    if isinstance(source, str | Path):
        return _of_file(Path(source), count)
    shape = getattr(source, "shape", ())
    if not isinstance(source, nib.Nifti1Pair) or len(shape) != 4 or shape[3] != count:
        found = f"shape {tuple(shape)}" if shape else type(source).__name__
        raise ArgumentError(f"source: expected {count} channels as the fourth axis, got {found}")
    images = tuple(source.slicer[..., number] for number in range(count))
    for image in images:  # slices know no file
        image.file_map["image"].filename = source.get_filename()
    return Channels("<nibabel image>", images)


def find_images(source: str | Path, count: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """As :func:`find_cases`, of cases of several channels.

    Args:
        source: a file as for :func:`as_channels`, or a folder of such files.
        count: of channels.

    Returns:
        Case name -> file or :class:`Channels`, and entry or case name -> why it is no case: also cases of which a
        channel is missing or one too many is there.

    Raises:
        FileNotFoundError: nothing there, or no volume.
        VolumeError: a single file that has other channels.
    """
    source = Path(source)
    if count == 1:
        return find_cases(source)
    if source.is_file():
        channels = _of_file(source, count)
        return {channels.case: channels}, {}
    named, problems, subfolders, foreign = named_files(source)
    whole: dict[str, list[Path]] = {}
    numbered: dict[str, dict[int, list[Path]]] = {}
    for path in (path for paths in named.values() for path in paths):
        case, number, _ = _split(path)
        if number is None:
            whole.setdefault(case, []).append(path)
        else:
            numbered.setdefault(case, {}).setdefault(number, []).append(path)
    cases: dict[str, Any] = {}
    for case in sorted({*whole, *numbered}):
        try:
            cases[case] = _one_case(case, whole.get(case, []), numbered.get(case, {}), count)
        except (OSError, ValueError) as error:
            problems[case] = error
    hint = left_out(subfolders, foreign)
    if not cases and not problems:
        raise FileNotFoundError(f"{source}: expected files ending in .nii or .nii.gz, found none; {hint}".rstrip("; "))
    if hint:
        warnings.warn(f"{source}: {hint}", stacklevel=2)
    return cases, problems


def _split(path: Path) -> tuple[str, int | None, str]:
    """Case, channel (None: the name has none) and ending of a file's name."""
    base = case_name(path)
    rest = path.name[len(base) :]
    if rest.startswith("_0000"):
        return base, 0, rest.removeprefix("_0000")
    found = CHANNEL.fullmatch(base)
    return (found[1], int(found[2]), rest) if found else (base, None, rest)


def _one_case(case: str, whole: list[Path], numbered: dict[int, list[Path]], count: int) -> Channels:
    paths = [*whole, *(path for number in sorted(numbered) for path in numbered[number])]
    if whole:
        if len(paths) > 1:
            raise ArgumentError(f"{case}: {' and '.join(path.name for path in paths)} are the same case; keep one")
        return _of_file(whole[0], count)
    for number, found in sorted(numbered.items()):
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise ArgumentError(f"{case}: {names} are the same channel {number}; keep one of them")
    _, _, ending = _split(paths[0])
    for number in range(count):
        if number not in numbered:
            raise FileNotFoundError(
                f"{case}: expected channel {number} in {paths[0].with_name(f'{case}_{number:04d}{ending}')}, "
                f"found no file beside {paths[0].name}"
            )
    if extra := sorted(set(numbered) - set(range(count))):
        raise ArgumentError(f"{case}: expected channels 0 to {count - 1}, found channel {extra[0]} too")
    return Channels(case, tuple(numbered[number][0] for number in range(count)))


def _of_file(path: Path, count: int) -> Channels:
    """The channels in a file, or in the files of the same name beside it."""
    case, number, ending = _split(path)
    if number is not None:
        beside = {
            found: [path.with_name(f"{case}_{found:04d}{ending}")]
            for found in range(count + 1)  # one too many is refused
            if path.with_name(f"{case}_{found:04d}{ending}").is_file()
        }
        return _one_case(case, [], beside or {number: [path]}, count)
    shape = examine(OneChannel(path, 0)).image.dataobj.shape
    if shape[3] != count:
        raise VolumeError(f"{path}: expected {count} channels as the fourth axis, found {shape[3]}")
    return Channels(case, tuple(OneChannel(path, channel) for channel in range(count)))


def several(images: Sequence[Any], case: str, names: Sequence[str]) -> Any:
    """The only image, or all as channels of a case."""
    return images[0] if len(images) == 1 else Channels(case, tuple(images), tuple(names))
