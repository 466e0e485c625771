"""Cases of files, read for training: by two mappings of names, or by a list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.channels import Channels, load_image, parts_of
from ..data.images import OneChannel
from ..data.labels import Labels, prepare_numbers
from ..data.masks import MOST_OF_A_VOLUME, Mask, check_grid, load_mask, load_numbers
from ..data.volumes import Preprocessing, Volume, VolumeError, prepare, prepare_mask
from ..errors import ArgumentError
from .cases import Case
from .cases_file import CaseList, ListedCase, images_of, load_lesion

__all__ = [
    "FileSource",
    "ListedSource",
    "Survey",
    "some",
]

MOST_NAMED = 10  # cases in a message


@dataclass(frozen=True)
class Survey:
    """What a source holds.

    Attributes:
        cases: their number.
        with_lesion: cases whose mask holds lesion.
        kept_lesion: cases of these that still hold some on the networks' grid.
        vanished: names of the others of these.
        unknown: numbers of masks that belong to none of the labels, and so are background.
    """

    cases: int
    with_lesion: int
    kept_lesion: int
    vanished: list[str]
    unknown: tuple[int, ...] = ()

    def text(self) -> str:
        """One line for people."""
        line = f"{self.cases} cases, {self.with_lesion} with lesion, {self.kept_lesion} on the networks' grid"
        line += f"; too small for it or outside the head: {some(self.vanished)}" if self.vanished else ""
        numbers = ", ".join(map(str, self.unknown))
        return line + (f"; of no label, and so background, are the numbers {numbers} of masks" if numbers else "")


@dataclass
class _Counted:
    """The numbers that count as lesion, and a note of others that masks were found to hold."""

    every: tuple[int, ...]
    others: set[int] = field(default_factory=set)

    def __contains__(self, number: object) -> bool:
        if isinstance(number, int) and number not in self.every:
            self.others.add(number)
        return number in self.every


class FileSource:
    """Cases of files on disk.

    Args:
        images: by name of the case.
        masks: files by name of the case; None: no truth is known, or none is asked for.
        preprocessing: as for prediction.
        names: the cases to take, in their order.
        labels: to be told apart; None: all that a mask marks is lesion.
    """

    def __init__(
        self,
        images: Mapping[str, Path | OneChannel | Channels],
        masks: Mapping[str, Sequence[Path]] | None,
        preprocessing: Preprocessing,
        names: Sequence[str],
        labels: Labels | None = None,
    ) -> None:
        self.images, self.masks, self.preprocessing, self.names = images, masks, preprocessing, list(names)
        self.labels = labels
        self.counted = None if labels is None else _Counted(labels.every)

    def files(self, name: str) -> list[Path]:
        """All files of a case, the image's first."""
        images = [image.path if isinstance(image, OneChannel) else image for image in parts_of(self.images[name])]
        masks = self.masks[name] if self.masks is not None else []
        return [*dict.fromkeys(images), *masks]

    def choice(self, name: str) -> str:
        """What a case takes of its files, where that is not all."""
        return "" if self.labels is None else repr(self.labels)

    def _mask(self, name: str, volume: Volume) -> Mask:
        """The mask of a case, of which the image is read."""
        assert self.masks is not None  # only then it is asked for
        (path,) = self.masks[name]
        if self.counted is not None:
            return load_numbers([path], volume.data, volume.name, self.counted)
        return load_mask(path, volume.data, volume.name)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Case:
        return self._read(self.names[index % len(self.names)])[0]

    def _read(self, name: str) -> tuple[Case, bool]:
        """The case, and whether its mask holds lesion on the file's grid."""
        volume = load_image(self.images[name])
        mask = self._mask(name, volume) if self.masks is not None else None
        if mask is not None:
            check_grid(mask, volume.name, volume.data.shape, volume.affine)
            if mask.share > MOST_OF_A_VOLUME:
                raise VolumeError(f"{mask.name}: expected a lesion mask, found {mask.share:.0%} of the volume marked")
        prepared = prepare(volume, self.preprocessing)
        to_grid = prepare_mask if self.labels is None else prepare_numbers
        lesion = to_grid(mask.voxels, prepared) if mask is not None else None
        return Case(name, prepared.data, lesion), bool(mask is not None and mask.voxels.any())

    def survey(self, progress: Callable[[list[str]], Iterable[str]] = lambda names: names) -> Survey:
        """Read every case once, so that none stops a training later.

        Args:
            progress: wraps the list of names.

        Raises:
            VolumeError: some cases cannot be used, all of which the message counts and the first ten it names; or
                there are masks, and no case holds lesion on its file's grid or none on the networks'.
            ArgumentError: no case holds some label on the networks' grid.
        """
        problems, kept, vanished = [], 0, []
        held: set[int] = set()
        every = () if self.labels is None else self.labels.every
        for name in progress(list(self.names)):
            try:
                case, with_lesion = self._read(name)
            except (OSError, ValueError, Warning) as error:  # warnings are errors under -W error
                problems.append(str(error))
                continue
            if with_lesion and case.lesion is not None:
                if case.lesion.any():
                    kept += 1
                    held |= {number for number in every if number not in held and (case.lesion == number).any()}
                else:
                    vanished.append(name)
        if problems:
            more = f"\n  and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
            listed = "".join(f"\n  {text}" for text in problems[:MOST_NAMED])
            raise VolumeError(f"{len(problems)} of {len(self.names)} cases cannot be used:{listed}{more}")
        unknown = () if self.counted is None else tuple(sorted(self.counted.others))
        survey = Survey(len(self.names), kept + len(vanished), kept, vanished, unknown)
        spacing = " x ".join(f"{step:g}" for step in self.preprocessing.spacing)
        if self.masks is not None and not kept:
            raise VolumeError(
                f"expected lesion in some mask on the grid of {spacing} mm, no case holds lesion: {survey.text()}"
            )
        if self.masks is not None and self.labels is not None:
            for name, own in zip(self.labels.names, self.labels.numbers, strict=True):
                if not held & set(own):
                    raise ArgumentError(
                        f"labels: expected {name}={'+'.join(map(str, own))} in some mask on the grid of {spacing} mm, "
                        f"found {', '.join(map(str, sorted(held | set(unknown))))}"
                    )
        return survey


class ListedSource(FileSource):
    """Cases of a list.

    Args:
        listing: they belong to.
        cases: those to take, in their order.
        preprocessing: as for prediction.
        masked: with their masks, which each then must have.
        channels: names of the images to take of each.
        labels: to be told apart; None: all that the list counts as lesion is.

    Raises:
        ArgumentError: a case of other images, or without mask where there must be one.
    """

    def __init__(
        self,
        listing: CaseList,
        cases: Sequence[ListedCase],
        preprocessing: Preprocessing,
        masked: bool = True,
        channels: Sequence[str] = ("image",),
        labels: Labels | None = None,
    ) -> None:
        images = {case.name: images_of(case, listing, channels) for case in cases}
        if masked and (without := [case.name for case in cases if not case.masks]):
            raise ArgumentError(f"expected cases with masks, found none in the list for {some(without)}")
        masks = {case.name: list(case.masks) for case in cases} if masked else None
        super().__init__(images, masks, preprocessing, list(images), labels)
        self.listing = listing
        self._cases = {case.name: case for case in cases}

    def choice(self, name: str) -> str:
        several = parts_of(self.images[name])
        channels = [getattr(image, "channel", None) for image in several]
        chosen = (self.listing.labels, self.listing.above_hu, channels[0])
        whole = "" if chosen == (None, None, None) else repr(chosen)
        return whole + (repr(channels) if len(several) > 1 else "") + super().choice(name)

    def _mask(self, name: str, volume: Volume) -> Mask:
        case = self._cases[name]
        # Intensities that say what is lesion are those of the list's first image, which may be another channel here.
        first = parts_of(self.images[name])[0] == case.images[0]
        return load_lesion(case, self.listing, volume if first else None, self.counted)


def some(names: Sequence[str]) -> str:
    """Names in a message, the first ten of them."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
