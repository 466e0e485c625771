"""What the masks of a listed case mark: its lesions, and voxels that nobody annotated."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import replace

from ..data.images import examine
from ..data.masks import ANY_LABEL, Mask, as_stored, check_grid, load_masks, load_numbers, read_masks
from ..data.volumes import Volume, load_volume
from .cases_file import CaseList, ListedCase

__all__ = [
    "load_ignored",
    "load_lesion",
    "read_lesions",
    "without",
]


def load_lesion(
    case: ListedCase,
    listing: CaseList,
    image: Volume | None = None,
    numbers: Container[int] | None = None,
) -> Mask:
    """The lesions of a case, its masks joined.

    Args:
        case: with at least one mask.
        listing: it belongs to, which says what is lesion.
        image: the case's, where it is in memory; the masks must not be the image itself.
        numbers: those that count and are told apart: the mask holds them; None: those of the list, as one.

    Returns:
        The mask, with its axes as the image is stored, as far as the image's header can be read.

    Raises:
        VolumeError: no masks, or the masks lie on several grids or, where its intensities count, not on the image's.
        FileNotFoundError: no such file.
    """
    voxels, name = (None, "its image") if image is None else (image.data, image.name)
    if numbers is not None:
        mask = load_numbers(case.masks, voxels, name, numbers)
    else:
        labels = ANY_LABEL if listing.labels is None else listing.labels
        mask = load_masks(case.masks, voxels, name, labels)
    mask = _as_the_image(case, mask) if image is None else as_stored(mask, image.data.shape, image.affine)
    if listing.above_hu is None:
        return mask
    return _above(mask, load_volume(case.images[0]) if image is None else image, listing.above_hu)


def load_ignored(case: ListedCase, listing: CaseList) -> Mask | None:
    """The voxels of a case that nobody annotated, of any of its masks; None where the list ignores none.

    Args:
        case: with at least one mask.
        listing: it belongs to.

    Returns:
        The mask, with its axes as the image is stored, as far as the image's header can be read.

    Raises:
        VolumeError, FileNotFoundError: as :func:`load_lesion`.
    """
    return _as_the_image(case, load_masks(case.masks, labels=listing.ignored)) if listing.ignored else None


def read_lesions(
    case: ListedCase, listing: CaseList
) -> tuple[Callable[[Container[int] | None], Mask], Callable[[Mask], Mask]]:
    """As :func:`load_lesion`, for several sets of labels: a case's files are read once.

    Args:
        case: with at least one mask.
        listing: it belongs to.

    Returns:
        What makes the mask of the labels that it is given, None: those of the list; and what leaves out of another mask
        of the case, such as a predicted one, what the list's ``above_hu`` leaves out of its own, and what it ignores.

    Raises:
        VolumeError, FileNotFoundError: as :func:`load_lesion`, also what is returned; or masks that do not lie on the
            image's grid, as far as its header can be read.
    """
    image = None
    with suppress(OSError, ValueError):  # whoever reads the image says so; masks can be compared without it
        image = examine(case.images[0])
    stored = read_masks(case.masks, image)
    volume = None if listing.above_hu is None else load_volume(case.images[0])
    listed = ANY_LABEL if listing.labels is None else listing.labels
    ignored = stored.marked(listing.ignored) if listing.ignored else None

    def cut(mask: Mask) -> Mask:
        if ignored is not None:
            mask = without(mask, ignored)
        if volume is None or listing.above_hu is None:
            return mask
        return _above(mask, volume, listing.above_hu)

    return lambda labels: cut(stored.marked(listed if labels is None else labels)), cut


def without(mask: Mask, ignored: Mask) -> Mask:
    """A mask but for the voxels of another one of its grid, however its axes are stored.

    Raises:
        VolumeError: another grid.
    """
    ignored = as_stored(ignored, mask.shape, mask.affine)
    check_grid(ignored, mask.name, mask.shape, mask.affine)
    return replace(mask, voxels=mask.voxels * ~ignored.voxels)


def _as_the_image(case: ListedCase, mask: Mask) -> Mask:
    """With its axes as those of the case's image."""
    with suppress(OSError, ValueError):  # whoever reads the image says so
        header = examine(case.images[0])
        mask = as_stored(mask, header.shape, header.affine)
    return mask


def _above(mask: Mask, image: Volume, limit: float) -> Mask:
    mask = as_stored(mask, image.data.shape, image.affine)
    check_grid(mask, image.name, image.data.shape, image.affine)
    return Mask(mask.voxels * (image.data > limit), mask.affine, mask.name, mask.labels)
