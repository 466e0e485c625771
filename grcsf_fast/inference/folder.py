"""A folder of volumes to a folder of masks: resumed where it stopped, shared by processes, every failure on record."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from ..data.failures import read_failures
from ..data.files import remove_partial, sha256, volume_files
from ..data.mask_files import check_endings, mask_endings
from ..data.reports import REPORT, read_report
from ..runtime.precision import PRECISIONS
from ..runtime.processes import World
from .case import in_lanes, predict_case
from .lanes import Failure, Job, Work
from .model import Model
from .plan import Image, Plan
from .prediction import check_length, check_own, check_same_input, output_names, same_channels
from .record import CaseResult, Done, Failed, Finished, Record, check_record
from .sources import file_of, files_of, origin_of, source_sha256

__all__ = ["check_alone", "earlier_precision", "is_finished", "predict_cases"]

MOST_OTHERS = 100  # results of other runs that are looked at for their precision


def earlier_precision(output: Path, names: Iterable[str], settings: Mapping[str, Any]) -> str | None:
    """The precision of results that a folder holds already, of the same settings in all else; None: there are none.

    Those of the cases of these names come first; some of other runs count as well.
    """
    own = (output / f"{name}{REPORT}" for name in names)
    for path in itertools.chain(own, itertools.islice(output.glob(f"*{REPORT}"), MOST_OTHERS)):
        found = read_report(path).get("settings")
        precision = found.get("precision") if isinstance(found, dict) else None
        if precision in PRECISIONS and found == {**settings, "precision": precision}:
            return precision
    return None


def is_finished(report: Path, source: Image, settings: Mapping[str, Any], outputs: list[str]) -> bool:
    """Whether a case's files are those of this input and these settings, by their content.

    Args:
        report: the case's; it may not be there.
        source: the input.
        settings: of the predictor.
        outputs: names of the files that there should be beside the report.
    """
    found = read_report(report)
    if not found or set(found["outputs"]) != set(outputs) or found.get("settings") != settings:
        return False
    if not same_channels(found, origin_of(source, settings.get("channels", ()))):
        return False
    files = {report.parent / name: expected for name, expected in found["outputs"].items()}
    try:
        whole = all(path.is_file() and sha256(path) == expected for path, expected in files.items())
        read = all(volume_files(file) for file in files_of(source))
        return whole and read and source_sha256(source) == found.get("input_sha256")
    except OSError:
        return False  # whatever cannot be read is named when it is tried


def predict_cases(
    model: Model,
    todo: Plan,
    output: str | Path,
    overwrite: bool,
    maps: bool,
    overlay: bool,
    page: bool,
    memory: int | None,
    world: World,
    mask_format: str = "nifti",
) -> Iterator[CaseResult]:
    """See :meth:`grcsf_fast.Predictor.predict_folder`."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    settings = model.settings()
    endings = {name: mask_endings(file_of(todo.cases[name]), mask_format) for name in todo.names}
    check_endings(ending for own in endings.values() for ending in own)
    files = {name: output_names(name, _ratios(model, maps), overlay, endings[name]) for name in todo.names}
    if world.rank == 0:
        # Files of another kind in their places are refused before anything is done.
        read_failures(output)
        check_record(output, todo, page)
    remove_partial(output)

    def case(name: str) -> Work[Done | Finished]:
        """From the file to its results on disk."""
        report = output / f"{name}{REPORT}"
        if not overwrite and is_finished(report, todo.cases[name], settings, files[name]):
            return Finished(name, read_report(report))
        _check_place(model, report, name, todo.cases[name], files[name], overwrite)
        prediction = yield from predict_case(model, todo.cases[name], name)
        began = time.perf_counter()
        prediction.save(output, None, maps, overlay, mask_format, overwrite)
        prediction.seconds["save"] = time.perf_counter() - began
        slices = len(prediction.prepared.foreground.flatten(0, 1).any(0).nonzero())
        return Done(name, prediction.report, prediction.seconds, slices)

    if todo.share is not None and world.rank == 0:
        todo.share.remove_others(output)
    cases = (Job(todo.cases[name], case(name), name) for name in todo.names)
    labels = () if model.bundle.labels is None else model.bundle.labels.names
    record = Record(output, todo, page, world, labels, settings)
    with closing(record), closing(in_lanes(model, cases, False, None, memory)) as results:
        for name, problem in todo.problems.items():
            yield record.noted(Failed(name, os.path.join(todo.folder, name), str(problem), ""))
        for result in results:
            if isinstance(result, Failure):
                file = os.path.abspath(file_of(result.source))
                result = Failed(result.name, file, result.message, result.traceback)
            yield record.noted(result)
        yield from record.completed()


def check_alone(
    model: Model,
    output: str | Path,
    name: str,
    source: Image,
    maps: bool,
    overlay: bool,
    mask_format: str = "nifti",
    overwrite: bool = False,
) -> None:
    """See that what :meth:`.Prediction.save` writes of a case has a place in a folder, before the case is computed.

    Args:
        model: to segment with.
        output: folder for the results; it may not be there.
        name: of the case.
        source: its file or files.
        maps, overlay, mask_format, overwrite: as for :meth:`.Prediction.save`.

    Raises:
        ArgumentError: a name that is too long for its files; another file or the result of another input is in their
            place; or SimpleITK is missing for the mask's format.
    """
    endings = mask_endings(file_of(source), mask_format)
    check_endings(endings)
    files = output_names(name, _ratios(model, maps), overlay, endings)
    _check_place(model, Path(output) / f"{name}{REPORT}", name, source, files, overwrite)


def _check_place(model: Model, report: Path, name: str, source: Image, files: list[str], overwrite: bool) -> None:
    check_length(report, name, files)
    check_own(report, name, files)
    if not overwrite:
        check_same_input(report, origin_of(source, model.bundle.channels), lambda: source_sha256(source))


def _ratios(model: Model, maps: bool) -> tuple[float, ...]:
    """Of the residual maps that are written."""
    return tuple(model.bundle.residual_maps.mask_ratios) if maps and model.mae is not None else ()
