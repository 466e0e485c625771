"""Cases of files, read for training: by two mappings of names, or by a list."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from torch import Tensor

from ..data.channels import Channels, load_image, parts_of
from ..data.files import volume_sha256
from ..data.images import OneChannel
from ..data.labels import Labels, prepare_numbers
from ..data.masks import MOST_OF_A_VOLUME, Mask, check_grid, load_mask, load_numbers
from ..data.volumes import Prepared, Preprocessing, Volume, VolumeError, prepare, prepare_mask
from ..errors import ArgumentError
from .cases import Case
from .cases_file import CaseList, ListedCase, images_of
from .lesions import load_ignored, load_lesion
from .survey import MOST_NAMED, Finding, Memory, Survey, side_by_side_in_order, some

__all__ = [
    "FileSource",
    "ListedSource",
]


@dataclass
class _Counted:
    """The numbers that count as lesion, and a note of others that masks were found to hold, but for the ignored."""

    every: tuple[int, ...]
    ignored: tuple[int, ...] = ()
    others: set[int] = field(default_factory=set)

    def __contains__(self, number: object) -> bool:
        if isinstance(number, int) and number not in (*self.every, *self.ignored):
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
        # Values of masks whose voxels nobody annotated.
        self.ignored: tuple[int, ...] = ()
        # Of cases that a survey has read, here or in a source that this one is a part of.
        self._contents: dict[str, str] = {}

    def part(self, names: Sequence[str]) -> Self:
        """The same with fewer cases, or in another order."""
        found = copy.copy(self)
        found.names = list(names)
        return found

    def files(self, name: str) -> list[Path]:
        """All files of a case, the image's first."""
        images = [image.path if isinstance(image, OneChannel) else image for image in parts_of(self.images[name])]
        masks = self.masks[name] if self.masks is not None else []
        return [*dict.fromkeys(images), *masks]

    def choice(self, name: str) -> str:
        """What a case takes of its files, where that is not all."""
        return "" if self.labels is None else repr(self.labels)

    def content(self, name: str) -> str:
        """Hash of the bytes of a case's files, and of its choice of them."""
        if name not in self._contents:
            digest = hashlib.sha256()
            for path in self.files(name):
                digest.update(volume_sha256(path).encode())
            digest.update(self.choice(name).encode())
            self._contents[name] = digest.hexdigest()
        return self._contents[name]

    def _mask(self, name: str, volume: Volume, counted: _Counted | None) -> Mask:
        """The mask of a case, of which the image is read."""
        assert self.masks is not None  # only then it is asked for
        (path,) = self.masks[name]
        if counted is not None:
            return load_numbers([path], volume.data, volume.name, counted)
        return load_mask(path, volume.data, volume.name)

    def _limits(self, name: str, prepared: Prepared) -> tuple[Tensor | None, Tensor | None]:
        """``ignored`` and ``dense`` of a case, as far as it has them."""
        return None, None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Case:
        return self._read(self.names[index % len(self.names)])[0]

    def _read(self, name: str, counted: _Counted | None = None) -> tuple[Case, bool]:
        """The case, and whether its mask holds lesion on the file's grid."""
        volume = load_image(self.images[name])
        if counted is None and self.labels is not None:
            counted = _Counted(self.labels.every, self.ignored)
        mask = self._mask(name, volume, counted) if self.masks is not None else None
        if mask is not None:
            check_grid(mask, volume.name, volume.data.shape, volume.affine)
            if mask.share > MOST_OF_A_VOLUME:
                raise VolumeError(f"{mask.name}: expected a lesion mask, found {mask.share:.0%} of the volume marked")
        prepared = prepare(volume, self.preprocessing)
        to_grid = prepare_mask if self.labels is None else prepare_numbers
        if mask is None:
            return Case(name, prepared.data, None), False
        ignored, dense = self._limits(name, prepared)
        case = Case(name, prepared.data, to_grid(mask.voxels, prepared), ignored=ignored, dense=dense)
        return case, bool(mask.voxels.any())

    def _finding(self, name: str) -> Finding:
        """What a case holds, by reading it."""
        counted = _Counted(self.labels.every, self.ignored) if self.labels is not None else None
        case, with_lesion = self._read(name, counted)
        numbers: tuple[int, ...] = ()
        if case.lesion is not None:
            every = (1,) if self.labels is None else self.labels.every
            numbers = tuple(number for number in every if (case.lesion == number).any())
        unknown = tuple(sorted(counted.others)) if counted is not None else ()
        return Finding(self.content(name), with_lesion, numbers, unknown)

    def survey(self, progress: Callable[[list[str]], Iterable[str]] = lambda names: names) -> Survey:
        """Read every case once, so that none stops a training later.

        Args:
            progress: wraps the list of names.

        Raises:
            VolumeError: some cases cannot be used, all of which the message counts and the first ten it names; or
                there are masks, and no case holds lesion on its file's grid or none on the networks'.
            ArgumentError: no case holds some label on the networks' grid.
        """
        labels = None if self.labels is None else repr(self.labels)
        memory = Memory(
            {"source": type(self).__name__, "preprocessing": self.preprocessing.as_json(), "labels": labels}
        )

        def look(name: str) -> tuple[str | None, Finding | Exception, bool]:
            key = memory.key(self.files(name), self.choice(name))
            if (known := memory.get(key)) is not None:
                return key, known, True
            try:
                return key, self._finding(name), False
            except (OSError, ValueError, Warning) as error:  # warnings are errors under -W error
                return key, error, False

        problems: list[str] = []
        found: dict[str, Finding] = {}
        remembered = 0
        try:
            with closing(side_by_side_in_order(look, self.names)) as looked_at:
                for name, (key, finding, known) in zip(progress(list(self.names)), looked_at, strict=True):
                    if isinstance(finding, Exception):
                        problems.append(str(finding))
                        continue
                    found[name] = finding
                    self._contents[name] = finding.content
                    if known:
                        remembered += 1
                    else:
                        memory.add(key, finding)
        finally:
            memory.save()
        if problems:
            more = f"\n  and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
            listed = "".join(f"\n  {text}" for text in problems[:MOST_NAMED])
            raise VolumeError(f"{len(problems)} of {len(self.names)} cases cannot be used:{listed}{more}")
        with_lesion = {name: one.numbers for name, one in found.items() if one.with_lesion}
        vanished = [name for name, numbers in with_lesion.items() if not numbers]
        unknown = tuple(sorted({number for one in found.values() for number in one.unknown}))
        kept = len(with_lesion) - len(vanished)
        survey = Survey(len(self.names), len(with_lesion), kept, vanished, unknown, remembered)
        spacing = " x ".join(f"{step:g}" for step in self.preprocessing.spacing)
        if self.masks is not None and not kept:
            raise VolumeError(
                f"expected lesion in some mask on the grid of {spacing} mm, no case holds lesion: {survey.text()}"
            )
        if self.masks is not None and self.labels is not None:
            held = {number for numbers in with_lesion.values() for number in numbers}
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
        self.listing, self.ignored = listing, listing.ignored
        self._cases = {case.name: case for case in cases}

    def files(self, name: str) -> list[Path]:
        files, image = super().files(name), self._cases[name].images[0]
        first = image.path if isinstance(image, OneChannel) else image
        # Its intensities say what of the masks is lesion.
        return files if self.masks is None or self.listing.above_hu is None or first in files else [*files, first]

    def choice(self, name: str) -> str:
        several = parts_of(self.images[name])
        channels = [getattr(image, "channel", None) for image in several]
        chosen = (self.listing.labels, self.listing.above_hu, channels[0])
        whole = "" if chosen == (None, None, None) else repr(chosen)
        whole += f"ignored {self.ignored}" if self.ignored else ""
        return whole + (repr(channels) if len(several) > 1 else "") + super().choice(name)

    def _mask(self, name: str, volume: Volume, counted: _Counted | None) -> Mask:
        # Intensities that say what is lesion are those of the list's first image, which may be another channel here.
        return load_lesion(self._cases[name], self.listing, volume if self._leads(name) else None, counted)

    def _leads(self, name: str) -> bool:
        """Whether the first channel is the list's first image."""
        return parts_of(self.images[name])[0] == self._cases[name].images[0]

    def _limits(self, name: str, prepared: Prepared) -> tuple[Tensor | None, Tensor | None]:
        unknown, dense = load_ignored(self._cases[name], self.listing), None
        if self.listing.above_hu is not None and self._leads(name):
            dense = prepare_mask(prepared.volume.data > self.listing.above_hu, prepared)
        return None if unknown is None else prepare_mask(unknown.voxels, prepared), dense
