"""What was found in one volume, and its files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from torch import Tensor

from ..data.files import HEADERS, SUFFIXES, check_no_file_name, replace_when_done, sha256
from ..data.labels import Labels
from ..data.mask_files import MASK_FORMATS, SAME, mask_endings, save_mask
from ..data.names import MAX_FILE, bytes_of, too_long
from ..data.reports import REPORT, is_report, read_json, read_report
from ..data.volumes import Prepared, like, restore, save_on_grid
from ..errors import ArgumentError
from ..runtime.threads import side_by_side
from .report import numbered_lesions
from .share import was_done

if TYPE_CHECKING:
    from .overlay import ShownMap

__all__ = [
    "Prediction",
    "check_length",
    "check_name",
    "check_own",
    "check_same_input",
    "output_names",
    "same_channels",
]

# Behind the name of a case, of all that a save of it may have left beside the report.
ENDINGS = re.compile(
    "_overlay\\.png|_residual[0-9]{1,3}\\.nii\\.gz|"
    + "|".join(re.escape(ending) for ending in (".nii.gz", *(one for endings in SAME.values() for one in endings)))
)


@dataclass(frozen=True)
class Prediction:
    """What was found in one volume, all images on the input's own grid and affine.

    Attributes:
        name: of the case.
        mask: uint8, 1 in lesions; with several labels their numbers.
        report: lesions, volumes, settings, versions, hashes of input and weights; ready for JSON.
        seconds: that each stage took; of a batch that several volumes shared, this one's part.
        prepared: the volume on the networks' grid.
        values: on the networks' grid, float32, (X, Y, Z): ``"probability"``, with labels (K, X, Y, Z); of the units
            that the network has ``"gcu_residual"`` and ``"patch_score"``; and the residual map by masking ratio.
    """

    name: str
    mask: nib.Nifti1Image
    report: dict[str, Any]
    seconds: dict[str, float]
    prepared: Prepared
    values: dict[float | str, Tensor] = field(repr=False)

    @cached_property
    def probability(self) -> nib.Nifti1Image:
        """float32 in [0, 1], with labels (X, Y, Z, K), as the network gave it whatever the bundle's ``above_hu``; made
        when first asked for."""
        values = self.values["probability"]
        if values.dim() == 3:
            return like(restore(values, self.prepared).clip(0, 1), self.prepared.volume)
        return like(np.stack([restore(one, self.prepared).clip(0, 1) for one in values], 3), self.prepared.volume)

    @cached_property
    def residual_maps(self) -> dict[float, nib.Nifti1Image]:
        """By masking ratio, float32, image minus reconstruction in units of the normalised intensity (their absolute
        values where ``report["settings"]["residual_maps"]["signed"]`` is False); empty for a network without RCU."""
        return {
            ratio: like(restore(values, self.prepared), self.prepared.volume)
            for ratio, values in self.values.items()
            if isinstance(ratio, float)
        }

    @cached_property
    def unit_maps(self) -> dict[str, nib.Nifti1Image]:
        """What the network's units saw in its first way of seeing the volume, float32, 0 where it did not look:
        ``"gcu_residual"``, how much of the finest features the next coarser ones do not show, in [0, 2], and
        ``"patch_score"``, the importance that the RCU gives to each patch of its finest level, in [0, 1]."""
        names = [key for key in self.values if isinstance(key, str) and key != "probability"]
        return {name: like(restore(self.values[name], self.prepared), self.prepared.volume) for name in names}

    def lesions(self, label: str | None = None) -> nib.Nifti1Image:
        """The lesions one by one, int32: 1 in the first of ``report["lesions"]``, 2 in the second, and so on.

        Args:
            label: by name, of a bundle that tells labels apart: the lesions of it alone, as numbered in
                ``report["labels"][label]["lesions"]``; None: of all together.

        Raises:
            ArgumentError: no such label.
        """
        mask = np.asarray(self.mask.dataobj)
        if label is not None:
            labels = self._labels()
            names = () if labels is None else labels.names
            if labels is None or label not in names:
                raise ArgumentError(f"label: expected None or one of {[*names]}, got {label!r}")
            mask = labels.marked(mask, label)
        return like(numbered_lesions(mask), self.prepared.volume)

    @property
    def image(self) -> nib.Nifti1Image:
        """The input as it was read, float32; of several channels the first."""
        return like(self.prepared.volume.data, self.prepared.volume)

    def save(
        self,
        folder: str | Path,
        name: str | None = None,
        maps: bool = True,
        overlay: bool = True,
        mask_format: str = "nifti",
        overwrite: bool = False,
    ) -> list[Path]:
        """Write mask, residual maps, report and overlay picture.

        The files are ``NAME.nii.gz`` (the mask), ``NAME_residual50.nii.gz`` and so on, ``NAME_report.json`` with the
        hash of each, and ``NAME_overlay.png``. Each appears under its name only when all are complete, the mask last;
        files that an earlier save of the case left and that do not belong to this one are removed.

        Args:
            folder: made if need be.
            name: of the case; None: its own.
            maps: with the residual maps.
            overlay: with the picture.
            mask_format: ``"nifti"``, or ``"same"``: of the mask, that of the input's file, see :func:`mask_endings`.
            overwrite: also in place of the result of another input of this name.

        Returns:
            The paths written.

        Raises:
            OSError: the folder cannot be written or is called like a file, or the disk is full.
            ArgumentError: a name that no case can have, or that is too long for its files; a file would replace the
                input, the result of another input, or, also with ``overwrite``, a file that is no result of the case:
                one that no report of it names, or another report; or SimpleITK is missing for the mask's format.
        """
        from .overlay import save_overlay

        if mask_format not in MASK_FORMATS:
            raise ArgumentError(f"mask_format: expected one of {MASK_FORMATS}, got {mask_format!r}")
        folder = Path(folder)
        check_no_file_name(folder)
        if name is not None:
            check_name(name)
        name = self.name if name is None else name
        grids = {key: values for key, values in self.values.items() if maps and isinstance(key, float)}
        endings = mask_endings(Path(self.report["input"]), mask_format)
        names = output_names(name, list(grids), overlay, endings)
        targets = [folder / f"{name}{REPORT}", *(folder / file for file in names)]
        check_length(targets[0], name, names)
        sources = [Path(self.report["input"]), *(Path(one["file"]) for one in self.report.get("inputs", []))]
        sources = [source for source in sources if source.exists()]

        def is_source(path: Path) -> bool:
            return path.exists() and any(path.samefile(source) for source in sources)

        for target in targets:
            if is_source(target):
                raise ArgumentError(
                    f"{target}: expected another folder or name, the result would replace the input itself"
                )
        check_own(targets[0], name, names)
        if not overwrite:
            check_same_input(targets[0], self.report, lambda: self.report["input_sha256"])
        stale = [
            folder / file
            for file in {*read_report(targets[0]).get("outputs", {})} - set(names)
            if _may_be_of(name, file) and not is_source(folder / file)
        ]
        try:
            with replace_when_done(*targets) as (report, *parts):
                rows, works = {}, list[Callable[[], Any]]()
                if overlay:
                    shown, picture = self._shown_maps(), parts[len(grids)]
                    works.append(partial(save_overlay, picture, self.prepared, self.mask, shown, self._labels()))
                    rows = {"overlay_rows": [one.name for one in shown]}
                for path, values in zip(parts, grids.values(), strict=False):
                    works.append(partial(save_on_grid, path, values, self.prepared))
                works.append(partial(save_mask, parts[-len(endings) :], self.mask, self.prepared.volume.affine))
                side_by_side(works)
                hashes = {file: sha256(part) for file, part in zip(names, parts, strict=True)}
                report.write_text(json.dumps(self.report | {"case": name, "outputs": hashes, **rows}, indent=2) + "\n")
                for path in stale:
                    path.unlink(missing_ok=True)
        except OSError as error:
            failed = OSError(f"{targets[-1]}: could not be written: {error.strerror or error}")
            failed.errno = error.errno
            raise failed from error
        return targets

    def _labels(self) -> Labels | None:
        labels = self.report["settings"].get("labels")
        return None if labels is None else Labels.from_json(labels)

    def _shown_maps(self) -> list[ShownMap]:
        """The residual map of the largest ratio and those of the units."""
        from .overlay import ShownMap

        signed = self.report["settings"]["residual_maps"]["signed"]
        ratios = [key for key in self.values if isinstance(key, float)]
        shown = [ShownMap(f"residual{round(100 * max(ratios))}", self.values[max(ratios)], signed)] if ratios else []
        for name in ("patch_score", "gcu_residual"):
            if name in self.values:
                shown.append(ShownMap(name, self.values[name]))
        return shown


def check_name(name: Any) -> None:
    """See that a name that was given to a case is one: no path, and no file's.

    Raises:
        ArgumentError: it is not.
    """
    if not isinstance(name, str) or not name or re.search(r"[/\\\0]", name) or name in (".", ".."):
        raise ArgumentError(f"name: expected that of a case, which its files begin with, without folders, got {name!r}")
    if ending := next((one for one in (*SUFFIXES, *HEADERS) if name.lower().endswith(one)), None):
        raise ArgumentError(f"name: expected that of a case, to which {ending} is added, got {name!r}; leave it out")


def check_length(report: Path, name: str, files: Sequence[str]) -> None:
    """See that no file of a case has a longer name than files can have; arguments as for :func:`check_own`.

    Raises:
        ArgumentError: one has.
    """
    if any(len(bytes_of(file) or b"") > MAX_FILE for file in (report.name, *files)):
        raise ArgumentError(f"{report.parent}: {too_long(name)}")


def check_own(report: Path, name: str, files: Sequence[str]) -> None:
    """See that a case's files replace nothing but an earlier result of a case of its name.

    A report that cannot be read is a damaged one of ours where a table beside it says that the case was done.

    Args:
        report: the case's; it may not be there. A run that was killed while it renamed has it first.
        name: of the case.
        files: names of those that are to lie beside it.

    Raises:
        ArgumentError: another file is in the place of the report, or one in the place of a file that the report does
            not name; the message names it.
    """
    another, known = "", {}
    try:
        found = read_json(report)
        if is_report(found):
            known = found.get("outputs")  # the first versions' reports name none
        else:
            another = "another file"
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        known = None
        if not was_done(report.parent, name):
            another = f"one that cannot be read ({getattr(error, 'strerror', None) or error})"
    if another:
        raise ArgumentError(
            f"{report}: expected no file, or the report of a result, found {another}, which the result of {name} "
            "would replace; choose another folder or name, or take it away"
        )
    for file in files if isinstance(known, dict) else []:
        path = report.with_name(file)
        if file not in known and os.path.lexists(path):
            raise ArgumentError(
                f"{path}: expected no file, or a result with {report.name} beside it that names it, found another "
                f"file, which the result of {name} would replace; choose another folder or name, or take it away"
            )


def _may_be_of(name: str, file: str) -> bool:
    """Whether a file may be one that a save of this case left beside its report."""
    return file.startswith(name) and ENDINGS.fullmatch(file, len(name)) is not None


def check_same_input(report: Path, origin: Mapping[str, Any], digest: Callable[[], str]) -> None:
    """See that a case's files on disk, if there are any, are not the result of another input of its name.

    Args:
        report: the case's; it may not be there.
        origin: of the input, see :func:`~grcsf_fast.inference.sources.origin_of`.
        digest: gives the input's hash, should its place be another than the report's.

    Raises:
        ArgumentError: they are of files in another place and with other bytes, or of other channels.
    """
    found = read_report(report)
    if not isinstance(found.get("input"), str):
        return
    places = [_places(one) for one in (found, origin)]
    if None not in places and places[0] == places[1]:
        return
    if same_channels(found, origin) and found.get("input_sha256") == digest():
        return
    raise ArgumentError(
        f"{origin['input']}: expected no result of another input under its name, found one of {found['input']} beside "
        f"{report}; choose another folder or name, or overwrite it"
    )


def same_channels(found: Mapping[str, Any], origin: Mapping[str, Any]) -> bool:
    """Whether two results are of the same channels of their files, wherever those lie."""
    pairs = [
        (one.get("input_channel"), [(each.get("channel"), each.get("place")) for each in one.get("inputs", [])])
        for one in (found, origin)
    ]
    return pairs[0] == pairs[1]


def _places(origin: Mapping[str, Any]) -> list[Any] | None:
    """Files and channels; None: from a path that led on from where another program was."""
    files = [origin["input"], *(one.get("file", "") for one in origin.get("inputs", []))]
    if not all(os.path.isabs(file) for file in files):
        return None
    channels = [origin.get("input_channel"), *(one.get("place") for one in origin.get("inputs", []))]
    return [*map(os.path.realpath, files), *channels]


def output_names(name: str, ratios: Sequence[float], overlay: bool, endings: Sequence[str] = (".nii.gz",)) -> list[str]:
    """The files of a case beside its report: residual maps, picture, mask, which has these endings."""
    maps = [f"{name}_residual{round(100 * ratio)}.nii.gz" for ratio in ratios]
    return [*maps, *([f"{name}_overlay.png"] if overlay else []), *(name + ending for ending in endings)]
