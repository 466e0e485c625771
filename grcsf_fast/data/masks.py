"""Masks in: which voxels of a file are lesion, what is no mask at all, and whether two files lie on one grid."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np

from .images import OpenImage, VolumeError, check_memory, open_image, read_voxels

__all__ = [
    "ANY_LABEL",
    "MOST_OF_A_VOLUME",
    "Mask",
    "StoredMasks",
    "as_stored",
    "check_grid",
    "load_mask",
    "load_masks",
    "load_numbers",
    "mark_lesion",
    "number_of",
    "read_masks",
    "same_grid",
]

ANY_LABEL = range(1, 2**31)
MAX_LABELS = 32  # of a mask; an image of whole numbers has more
# Of the largest value: what resampling, compression and scale factors leave beside 0 or a whole number.
TOLERANCE = 1e-3
NOTHING = 1e-6  # a mask whose largest value is below holds noise alone
# Values from 0 to 1 are a soft mask while its edges are under a tenth of the volume or not ten times its inside.
EDGE = (0.05, 0.95)
MOST_EDGES = 0.1
MOST_OF_A_VOLUME = 0.5  # a mask of more is the brain's, the background's or an image
MAX_DISTANCE = 0.1  # of the smallest voxel, between corners of two grids that are taken for one
SHOWN = 6  # values in a message
SCALED = 0.01  # from 1/100 down a label 1 that a scale factor made a fraction, such as 1/255


@dataclass(frozen=True)
class Mask:
    """A lesion mask as it lies in its file.

    Attributes:
        voxels: (X, Y, Z) bool; of :func:`load_numbers` uint8.
        affine: (4, 4) float64, voxel to mm.
        name: for messages, the path as given.
        labels: values of the file that count as lesion, in order; none where the mask is empty.
    """

    voxels: np.ndarray
    affine: np.ndarray
    name: str
    labels: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        return self.voxels.shape

    @property
    def share(self) -> float:
        """Of the volume that is lesion."""
        return np.count_nonzero(self.voxels) / self.voxels.size


@dataclass(frozen=True)
class _Stored:
    """A mask's file in memory; ``whole`` is what :func:`_check` says of it."""

    values: np.ndarray
    affine: np.ndarray
    name: str
    whole: np.ndarray | None

    def marked(self, labels: Container[int] | None) -> Mask:
        voxels, found = _marked(self.values, self.name, self.whole, labels)
        return Mask(voxels, self.affine, self.name, found)


@dataclass(frozen=True)
class StoredMasks:
    """The masks of one image as they are stored, for whoever marks several sets of labels; see :func:`read_masks`."""

    parts: tuple[_Stored, ...]

    def marked(self, labels: Container[int] | None) -> Mask:
        """As :func:`load_masks` of the same files, without reading them again.

        Raises:
            VolumeError: the masks lie on several grids.
        """
        return _joined(part.marked(labels) for part in self.parts)


def load_mask(
    path: str | Path | nib.spatialimages.SpatialImage,
    image: np.ndarray | None = None,
    image_name: str = "its image",
    labels: Container[int] | None = None,
) -> Mask:
    """Read a lesion mask; :func:`mark_lesion` says which values are lesion.

    Args:
        path: to a NIfTI file, or a nibabel image. Trailing axes of length 1 are dropped.
        image: (X, Y, Z) of the image it belongs to, which it must not be itself.
        image_name: of that in messages.
        labels: those that count as lesion; None: all, with a warning where there are several.

    Raises:
        VolumeError: no readable 3-D NIfTI file, no mask, or the image itself.
        FileNotFoundError: no such file.
    """
    opened = open_image(path)
    values = read_voxels(opened)
    if image is not None and np.array_equal(values, image):
        raise VolumeError(f"{opened.name}: expected a mask, found the voxels of the image {image_name} itself")
    voxels, found = mark_lesion(values, opened.name, labels)
    return Mask(voxels, opened.affine, opened.name, found)


def load_masks(
    paths: Sequence[str | Path],
    image: np.ndarray | None = None,
    image_name: str = "its image",
    labels: Container[int] | None = ANY_LABEL,
) -> Mask:
    """Read the masks of one image, each of which holds some of its lesions, as one.

    Args:
        paths: at least one; the joined mask has the first one's affine and name.
        image: as for :func:`load_mask`.
        image_name: as for :func:`load_mask`.
        labels: those that count as lesion.

    Raises:
        VolumeError: as :func:`load_mask`, or the masks lie on several grids.
        FileNotFoundError: no such file.
    """
    return _joined(load_mask(path, image, image_name, labels) for path in paths)


def read_masks(paths: Sequence[str | Path], grid: Mask | OpenImage | None = None) -> StoredMasks:
    """Read the masks of one image once, to mark different labels in them.

    Args:
        paths: at least one.
        grid: on whose grid they are to lie, which their headers say before a voxel is read; masks of that grid with
            axes in another order or direction are turned, see :func:`as_stored`.

    Raises:
        VolumeError: no readable 3-D NIfTI file, no mask, another grid, or more voxels than memory has room for.
        FileNotFoundError: no such file.
    """
    parts = []
    for path in paths:
        opened = open_image(path)
        turns = None
        if grid is not None and (turns := _turns(opened, grid.shape, grid.affine)) is None:
            check_grid(opened, grid.name, grid.shape, grid.affine)
        check_memory(opened)
        values, affine = read_voxels(opened), opened.affine
        if turns is not None:
            values, affine = _turned(values, affine, turns)
        parts.append(_Stored(values, affine, opened.name, _check(values, opened.name)))
    return StoredMasks(tuple(parts))


def _joined(masks: Iterable[Mask]) -> Mask:
    first, *others = masks
    voxels = first.voxels
    for other in (as_stored(mask, first.shape, first.affine) for mask in others):
        check_grid(other, first.name, first.shape, first.affine)
        voxels = voxels | other.voxels
    found = {label for mask in (first, *others) for label in mask.labels}
    return Mask(voxels, first.affine, first.name, tuple(sorted(found)))


def load_numbers(
    paths: Sequence[str | Path], image: np.ndarray | None, image_name: str, numbers: Container[int]
) -> Mask:
    """As :func:`load_masks`, with the number of each voxel.

    Args:
        paths: at least one.
        image: as for :func:`load_mask`.
        image_name: as for :func:`load_mask`.
        numbers: from 1 to 255, those that count.

    Raises:
        VolumeError: as :func:`load_masks`, a number above 255, or two masks have different numbers at one voxel.
        FileNotFoundError: no such file.
    """
    joined: Mask | None = None
    for path in paths:
        opened = open_image(path)
        values = read_voxels(opened)
        if image is not None and np.array_equal(values, image):
            raise VolumeError(f"{opened.name}: expected a mask, found the voxels of the image {image_name} itself")
        marked, kept = mark_lesion(values, opened.name, numbers)
        if len(kept) and (kept[-1] if len(kept) > 1 else number_of(kept[0])) > 255:
            raise VolumeError(f"{opened.name}: expected labels from 1 to 255, found {kept[-1]:.0f}")
        found = np.zeros(values.shape, np.uint8)
        # The only value of a mask may be no whole number; it stands for 1 then.
        found[marked] = number_of(kept[0]) if len(kept) == 1 else np.rint(values[marked])
        mask = Mask(found, opened.affine, opened.name, kept)
        if joined is None:
            joined = mask
            continue
        mask = as_stored(mask, joined.shape, joined.affine)
        check_grid(mask, joined.name, joined.shape, joined.affine)
        found = mask.voxels
        if apart := int(((found != joined.voxels) & (found != 0) & (joined.voxels != 0)).sum()):
            raise VolumeError(
                f"{mask.name}: expected the label that the case's other masks, the first of them {joined.name}, give a "
                f"voxel, found another at {apart} voxels"
            )
        voxels = np.where(joined.voxels == 0, found, joined.voxels)
        joined = Mask(voxels, joined.affine, joined.name, tuple(sorted({*joined.labels, *kept})))
    if joined is None:
        raise VolumeError("expected at least one mask, got none")
    return joined


def mark_lesion(
    values: np.ndarray, name: str, labels: Container[int] | None = None
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Voxels from half of a label's value up.

    A mask has one value beside 0 (1, 255, ...), whole numbers that are several labels, or is soft, with values from 0
    to 1, as interpolation and probabilities make it. Several labels become one and soft masks are cut at 0.5, both
    with a warning that says so. One value is a label, with a warning if it is under 0.5 and no 1/255 or the like.
    Values under a thousandth of the largest one are noise, unless they are whole numbers.

    Args:
        values: (X, Y, Z), bool, integers or floating-point numbers.
        name: of the mask in messages.
        labels: those that count as lesion, for whoever has chosen them and needs no warning; None: all. One value that
            is no whole number, as a scale factor makes it, and a soft mask stand for label 1.

    Returns:
        (X, Y, Z) bool, and the values that count as lesion, in order.

    Raises:
        VolumeError: complex or RGB values, NaN or infinite ones, negative ones, more than 32 whole numbers, or other
            values than a mask's; the message names some of them.
    """
    return _marked(values, name, _check(values, name), labels)


def _check(values: np.ndarray, name: str) -> np.ndarray | None:
    """The labels above 0 that a mask's values stand for, in order; None of a soft mask.

    Raises:
        VolumeError: as :func:`mark_lesion`.
    """
    if values.dtype == bool:
        return np.ones(int(values.any()))
    if values.dtype.kind not in "iuf":
        kind = {"c": "complex numbers", "V": "several channels such as RGB"}.get(values.dtype.kind, "other values")
        raise VolumeError(
            f"{name}: expected a mask of integers or floating-point numbers, found {kind} ({values.dtype})"
        )
    if values.dtype.kind == "f" and (bad := values.size - int(np.isfinite(values).sum())):
        raise VolumeError(
            f"{name}: expected a mask of finite values, found {bad} NaN or infinite ones of {values.size}"
        )
    found, counts = np.unique(values[values != 0], return_counts=True)
    found = found.astype(np.float64)
    largest = float(np.abs(found).max(initial=0))
    if largest < NOTHING:
        if largest:
            warnings.warn(f"{name}: no value is above {largest:.3g}, which is taken for 0", stacklevel=3)
        return np.zeros(0)
    noise = (np.abs(found) <= TOLERANCE * largest) & (np.rint(found) == 0)
    found, counts = found[~noise], counts[~noise]
    if found[0] < 0:
        raise VolumeError(f"{name}: expected a mask, found negative values: {_listed(found)}")
    whole = _labels(found, largest)
    if whole is None:
        edge, inside = (float(counts[part].sum()) / values.size for part in _edge_and_inside(found))
        if largest > 1 + TOLERANCE or (edge > MOST_EDGES and inside < edge / 10):
            raise VolumeError(
                f"{name}: expected a mask of whole numbers or of values from 0 to 1 that are mostly close to either, "
                f"found {len(found)} values as in an image: {_listed(found)}"
            )
        warnings.warn(
            f"{name}: a mask of {len(found)} values from 0 to 1 ({_listed(found)}) is cut at 0.5", stacklevel=3
        )
        return None if largest >= 0.5 else np.zeros(0)
    if len(whole) == 1 and whole[0] < 0.5 and not _is_scaled(whole[0]):
        warnings.warn(
            f"{name}: {whole[0]:.5g}, the only value beside 0, is taken for a label and counts as lesion; of a soft "
            "mask, which is cut at 0.5, it would not", stacklevel=3,
        )  # fmt: skip
    if len(whole) > MAX_LABELS:
        raise VolumeError(
            f"{name}: expected a mask of at most {MAX_LABELS} labels, found {len(whole)} values as in an image: "
            f"{_listed(whole)}"
        )
    return whole


def _marked(
    values: np.ndarray, name: str, whole: np.ndarray | None, labels: Container[int] | None
) -> tuple[np.ndarray, tuple[float, ...]]:
    """As :func:`mark_lesion`, of values that :func:`_check` has seen."""
    if values.dtype == bool:
        counts = labels is None or 1 in labels
        return (values, (1.0,) if values.any() else ()) if counts else (np.zeros_like(values), ())
    if whole is None:
        counts = labels is None or 1 in labels
        return (values >= 0.5, (1.0,)) if counts else (np.zeros(values.shape, bool), ())
    if not len(whole):
        return np.zeros(values.shape, bool), ()
    if labels is None:
        if len(whole) > 1:
            warnings.warn(
                f"{name}: {len(whole)} labels ({_listed(whole)}) are merged into one lesion mask", stacklevel=3
            )
        return values >= whole[0] / 2, tuple(whole.tolist())
    if len(whole) == 1:
        kept = whole if number_of(whole[0]) in labels else whole[:0]
        return (values >= whole[0] / 2) & bool(kept.size), tuple(kept.tolist())
    kept = [label for label in whole.tolist() if int(label) in labels]
    return np.isin(values if values.dtype.kind in "iu" else np.rint(values), kept), tuple(kept)


def number_of(label: float) -> int:
    """Of the only label of a mask, which may be no whole number and stands for 1 then."""
    return round(label) if abs(label - round(label)) <= TOLERANCE * max(1.0, label) and round(label) else 1


def _is_scaled(label: float) -> bool:
    """Whether it is 1 / n of a whole number n from 100 up."""
    return label <= SCALED * (1 + 1e-6) and abs(label * round(1 / label) - 1) <= 1e-6


def _labels(found: np.ndarray, largest: float) -> np.ndarray | None:
    """The labels that the values above 0 stand for, in order; None where they are neither one value nor whole."""
    if largest - found[0] <= TOLERANCE * largest:
        return found[-1:]
    whole = np.rint(found)
    near = np.abs(found - whole) <= min(0.25, TOLERANCE * max(1.0, largest))
    return np.unique(whole[whole > 0]) if near.all() else None


def _edge_and_inside(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = EDGE
    return (found > low) & (found < high), found >= high


def _listed(values: np.ndarray) -> str:
    shown = values if len(values) <= SHOWN else [*values[: SHOWN // 2], *values[-SHOWN // 2 :]]
    texts = [f"{value:.5g}" for value in shown]
    if len(values) > SHOWN:
        texts.insert(SHOWN // 2, "...")
    return ", ".join(texts)


def check_grid(mask: Mask | OpenImage, name: str, shape: tuple[int, int, int], affine: np.ndarray) -> None:
    """See that a mask lies on the grid of another file.

    Headers round their numbers, so corners of the two grids may be apart by a tenth of the smallest voxel.

    Args:
        mask: which is checked, or its header.
        name: of the file whose grid is expected.
        shape: (X, Y, Z) of that file.
        affine: (4, 4) of that file, voxel to mm.

    Raises:
        VolumeError: another shape, or corners further apart; the message says by how many mm.
    """
    apart, allowed = _apart(mask.shape, mask.affine, shape, affine), _allowed(affine)
    if mask.shape != tuple(shape) or not apart <= allowed:
        only = _turns(mask, shape, affine) is not None
        turned = "; only its axes have another order or direction: nibabel's as_reoriented stores it as that grid is"
        raise VolumeError(
            f"{mask.name}: expected the grid of {name} {tuple(shape)}, found shape {mask.shape} and corners up to "
            f"{apart:.4g} mm from that grid's, where {allowed:.3g} mm are allowed{turned if only else ''}"
        )


def as_stored(mask: Mask, shape: tuple[int, int, int], affine: np.ndarray) -> Mask:
    """A mask with its axes in the order and direction in which another file of the same grid is stored.

    By the affines every voxel stays at its place in mm, on its side of the body; nothing is resampled.

    Args:
        mask: to be turned.
        shape: (X, Y, Z) of the other file.
        affine: (4, 4) of that file, voxel to mm.

    Returns:
        The same mask where it is stored so already, or lies on another grid.
    """
    if (turns := _turns(mask, shape, affine)) is None:
        return mask
    voxels, own = _turned(mask.voxels, mask.affine, turns)
    return replace(mask, voxels=voxels, affine=own)


def _turns(mask: Mask | OpenImage, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray | None:
    """The orientation, as nibabel has them, of a mask in a grid; None: that of the grid, or the mask lies elsewhere."""
    if not (np.isfinite(mask.affine).all() and np.isfinite(affine).all()):
        return None
    steps = np.linalg.solve(affine[:3, :3], mask.affine[:3, :3])  # of the mask's axes, in the grid's voxels
    axes = np.abs(steps).argmax(0)
    turns = np.stack([axes, np.sign(steps[axes, range(3)])], 1)
    if sorted(axes) != [0, 1, 2] or (turns == [[0, 1], [1, 1], [2, 1]]).all():
        return None
    turned = tuple(np.array(mask.shape)[np.argsort(axes)].tolist())
    own = mask.affine @ nib.orientations.inv_ornt_aff(turns, mask.shape)
    return turns if turned == tuple(shape) and _apart(turned, own, shape, affine) <= _allowed(affine) else None


def _turned(values: np.ndarray, affine: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    own = affine @ nib.orientations.inv_ornt_aff(turns, values.shape)
    return np.ascontiguousarray(nib.orientations.apply_orientation(values, turns)), own


def _apart(shape: tuple[int, ...], affine: np.ndarray, goal: tuple[int, ...], goal_affine: np.ndarray) -> float:
    """By how many mm the corners of two grids are apart at most."""
    return float(np.linalg.norm(_corners(shape, affine) - _corners(goal, goal_affine), axis=1).max())


def _allowed(affine: np.ndarray) -> float:
    return MAX_DISTANCE * float(nib.affines.voxel_sizes(affine).min())


def same_grid(first: OpenImage, second: OpenImage) -> bool:
    """Whether two files lie on one grid, as :func:`check_grid` sees it, by their headers alone."""
    try:
        check_grid(first, second.name, second.shape, second.affine)
    except VolumeError:
        return False
    return True


def _corners(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """(8, 3) mm: the outer corners of a grid's box."""
    ends = np.array(list(product(*((-0.5, size - 0.5) for size in shape))))
    return nib.affines.apply_affine(affine, ends)
