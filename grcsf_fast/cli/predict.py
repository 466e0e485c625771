"""``grcsf-fast predict``."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from ..data.channels import Channels, as_channels, find_images
from ..data.failures import change_failures
from ..data.files import case_name, check_writable, remove_partial
from ..data.images import OneChannel, VolumeError
from ..data.mask_files import MASK_FORMATS
from ..data.reports import REPORT, amount, read_report
from ..datasets.cases_file import CaseList, ListedCase, images_of
from ..errors import ArgumentError
from ..inference.folder import check_alone, earlier_precision
from ..inference.page import PAGE_NAME
from ..inference.plan import Plan, check_names, plan
from ..inference.predictor import Predictor
from ..inference.record import Done, Failed, Finished, note_alone
from ..inference.share import Share
from ..inference.sources import file_of
from ..networks.weights import find_folder
from ..pretrained.bundle import Bundle, load_bundle, read_channels, read_config
from ..runtime.memory import in_units
from ..runtime.precision import PRECISIONS
from ..runtime.processes import World, described_world, device_of, one_of_many, said_by_first
from ..runtime.progress import busy, steps
from .listed import add_listed, chosen_cases, fold_or_test, trained_on_fold
from .options import number
from .recipes import add_recipe
from .shared import AT_LEAST_1, about_arguments, add_device, new_command, printable, report_failures

__all__ = ["add"]


def add(commands: Any) -> None:
    command = new_command(
        commands, "predict", run,
        "Segment a volume, or every one in a folder or list. Finished cases of a folder are left as they are; under "
        "torchrun, processes share the cases.",
        "what is written is whole, the same command goes on from there",
    )  # fmt: skip
    command.add_argument(
        "-i", "--input", metavar="FILE|FOLDER", help="a volume, or a folder of them or with one DICOM series"
    )
    add_listed(command, "-i", fold_or_test, "the cases to segment; test: those in no fold (default: all)")
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for masks, maps, pictures, reports")
    add_recipe(command)
    command.add_argument("-m", "--model", default="demo", help="a bundle's folder, or the name of a packaged one")
    command.add_argument("--batch-size", type=AT_LEAST_1, default=16, metavar="N", help="axial slices at once")
    command.add_argument("--backend", default="auto", help="of the two ops; see `grcsf-fast info`")
    command.add_argument(
        "--precision", choices=[*PRECISIONS, "auto"], default="auto",
        help="auto: bfloat16 where it is faster, measured once per processor; a folder of results keeps its own",
    )  # fmt: skip
    command.add_argument(
        "--importance-threshold", type=number(float, least=0, most=1), metavar="P", default=argparse.SUPPRESS,
        help="skip patches scored below it (default: the bundle's)",
    )  # fmt: skip
    command.add_argument(
        "--compile", action="store_true", help="fuse the network by torch's compiler; measure whether it pays"
    )
    command.add_argument(
        "--format", choices=MASK_FORMATS, default="nifti",
        help="of masks; same: that of the input, but for DICOM (.mhd: as .mha, in one file)",
    )  # fmt: skip
    command.add_argument("--no-maps", dest="maps", action="store_false", help="without residual maps")
    command.add_argument("--no-overlay", dest="overlay", action="store_false", help="without pictures")
    command.add_argument("--no-page", dest="page", action="store_false", help="of a folder: without index.html")
    command.add_argument(
        "--share",
        type=_share,
        metavar="K/N",
        default=argparse.SUPPRESS,
        help="of a folder or list: the Kth of N shares of the cases alone, as a job of an array",
    )
    command.add_argument(
        "--overwrite", action="store_true",
        help="do finished cases of a folder again, and replace results of other inputs that have the same names",
    )  # fmt: skip
    command.add_argument(
        "--memory", type=number(float, above=0), metavar="GIB", default=argparse.SUPPRESS,
        help="memory for the volumes being processed together (default: most of what is free)",
    )  # fmt: skip
    add_device(command)


def run(options: argparse.Namespace) -> int:
    chosen = chosen_cases(options, "input")
    if chosen is None and options.input is None:
        raise ArgumentError("expected --input or --cases, got neither")
    if chosen is None and Path(options.input).is_file():
        cases, _ = _images_of_folder(options)
        (path,) = cases.values()
        if hasattr(options, "share"):
            raise ArgumentError("--share: expected a folder or list of cases to share, got one volume")
        return _predict_one(options, path)
    with one_of_many() as world:
        cases, problems = {}, {}
        # One process looks, and says what it saw: a file system may show several something different.
        if world.rank == 0 and chosen is not None:
            cases, problems = _images_of_list(options, *chosen)
        elif world.rank == 0:
            cases, problems = _images_of_folder(options)
        todo = plan(
            cases, problems, world, "" if chosen is not None else options.input, getattr(options, "share", None)
        )
        return _predict_folder(options, _folder_predictor(options, todo, world), todo, world)


def _images_of_folder(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """By name, once it is sure that no result replaces one of them; and what is no case."""
    with about_arguments():
        cases, problems = find_images(options.input, len(read_channels(options.model)))
    check_writable(options.output)
    check_names(options.input, options.output, cases)
    return cases, problems


def _images_of_list(
    options: argparse.Namespace, listing: CaseList, listed: list[ListedCase]
) -> tuple[dict[str, Path | OneChannel | Channels], dict[str, Exception]]:
    """By name, once it is sure that no result replaces one of them or a mask of the list; and why others are none.

    Raises:
        ArgumentError: none of the cases has an image for the bundle's channels, two have the same, or the locale has
            no file of a case's name.
    """
    channels = read_channels(options.model)
    held_out = trained_on_fold(read_config(find_folder(options.model))["card"], listing, options.fold)
    if held_out is not None:
        warnings.warn(
            f"{options.model}: its training held out {held_out} of {options.cases} and has seen fold {options.fold}: "
            "figures of these cases say nothing of others",
            stacklevel=2,
        )
    cases, problems = {}, dict[str, Exception]()
    for case in listed:
        try:
            os.fsencode(case.name)
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"{options.cases}: expected names that files can have in this locale, whose encoding is "
                f"{sys.getfilesystemencoding()}, found {case.name}; LC_ALL=C.UTF-8 has all"
            ) from error
        try:
            cases[case.name] = images_of(case, listing, channels)
        except ArgumentError as error:
            problems[case.name] = error
    if not cases:
        raise next(iter(problems.values()))
    if len(set(cases.values())) < len(cases):
        raise ArgumentError(f"{options.cases}: expected another image for every case, found one of two cases")
    check_writable(options.output)
    folders = set()
    for file in (file for case in listing.cases for file in (*map(file_of, case.images), *case.masks)):
        with suppress(OSError, RuntimeError):  # of links in a circle, in which there is nothing to replace
            folders.add((file if os.path.isdir(file) else file.parent).resolve())
    check_names(options.cases, options.output, {*cases, *problems}, folders)
    return cases, problems


def _predict_one(options: argparse.Namespace, path: Path | Channels) -> int:
    """One volume, for which processes need not meet."""
    world = World()
    with suppress(ArgumentError):
        world = described_world()
    if world.rank:
        print(f"process {world.rank} of {world.size}: one volume is work for process 0 alone", file=sys.stderr)
        return 0
    name = path.case if isinstance(path, Channels) else case_name(path)
    bundle = load_bundle(options.model)
    predictor = _predictor(options, bundle, world, options.precision)
    precision, reason = _settled_precision(options, [name], predictor)
    if precision != predictor.precision:
        predictor = _predictor(options, bundle, world, precision)
    _say_precision(options, precision, reason)
    remove_partial(options.output)
    try:
        check_alone(
            predictor, options.output, name, path, options.maps, options.overlay, options.format, options.overwrite
        )
        _check_memory(options, predictor, path)
        prediction = predictor(path)
        with busy("saving"):
            prediction.save(
                options.output, maps=options.maps, overlay=options.overlay, mask_format=options.format,
                overwrite=options.overwrite,
            )  # fmt: skip
    except Exception as error:
        file = os.path.abspath(file_of(path))
        # Its result from before must not pass for the present one.
        if read_report(Path(options.output) / f"{name}{REPORT}").get("input") == file:
            text = {"error": str(error), "traceback": "".join(traceback.format_exception(error))}
            change_failures(options.output, {name: {"input": file, **text}})
            note_alone(options.output, Failed(name, file, **text), options.page)
        raise
    change_failures(options.output, {}, lambda name, _: name == prediction.name)
    note_alone(options.output, Done(prediction.name, prediction.report, prediction.seconds, 0), options.page)
    print(printable(f"{_described(prediction.report)}, {sum(prediction.seconds.values()):.1f} s"))
    return 0


def _check_memory(options: argparse.Namespace, predictor: Predictor, path: Path | Channels) -> None:
    """See that the volume needs no more than --memory, as a folder's would have to."""
    asked = predictor.bytes_needed(as_channels(path, predictor.in_channels))
    if hasattr(options, "memory") and asked > (most := int(options.memory * 2**30)):
        raise VolumeError(f"{path}: expected to need at most {in_units(most)} of memory, asks for {in_units(asked)}")


def _folder_predictor(options: argparse.Namespace, todo: Plan, world: World) -> Predictor:
    """All processes, and the runs before this one of whose results the folder holds some, use the same precision."""
    bundle = load_bundle(options.model)
    if options.precision != "auto":
        return _predictor(options, bundle, world, options.precision)
    predictor = _predictor(options, bundle, world, "auto") if world.rank == 0 else None
    precision, reason = said_by_first(world, lambda: _settled_precision(options, sorted(todo.cases), predictor))
    if predictor is None or precision != predictor.precision:
        predictor = _predictor(options, bundle, world, precision)
    if world.rank == 0:
        _say_precision(options, precision, reason)
    return predictor


def _settled_precision(options: argparse.Namespace, names: list[str], predictor: Predictor) -> tuple[str, str]:
    """That of a predictor, or with "auto" the one in which the folder of results was begun; and why."""
    earlier = None
    if options.precision == "auto" and not options.overwrite:
        earlier = earlier_precision(Path(options.output), names, predictor.settings())
    if earlier in (None, predictor.precision):
        return predictor.precision, predictor.precision_reason
    return earlier, f"as in the results in {options.output}"


def _predictor(options: argparse.Namespace, bundle: Bundle, world: World, precision: str) -> Predictor:
    return Predictor(
        bundle, device_of(world, options.device), options.backend, options.batch_size,
        progress=options.input is not None and Path(options.input).is_file(), precision=precision,
        importance_threshold=getattr(options, "importance_threshold", None), compiled=options.compile,
    )  # fmt: skip


def _say_precision(options: argparse.Namespace, precision: str, reason: str) -> None:
    if options.precision == "auto":
        print(printable(f"precision {precision}: {reason}"))


def _predict_folder(options: argparse.Namespace, predictor: Predictor, todo: Plan, world: World) -> int:
    memory = getattr(options, "memory", None)
    # The other lanes' next operations wait for Python code, such as a picture's, no longer than this.
    sys.setswitchinterval(2e-4)
    results = predictor.predict_folder(
        todo, options.output, overwrite=options.overwrite, maps=options.maps, overlay=options.overlay,
        page=options.page, memory=None if memory is None else int(memory * 2**30), world=world,
        mask_format=options.format,
    )  # fmt: skip
    began, slices, finished_before, failures = time.perf_counter(), 0, 0, dict[str, str]()
    with steps(len(todo.names) + len(todo.problems), 0, "cases") as moving, closing(results):
        for result in results:
            match result:
                case Done():
                    slices += result.slices
                    if sys.stdout is not None:
                        moving.write(printable(_described(result.report)), file=sys.stdout)
                case Finished():
                    finished_before += 1
                case Failed():
                    failures[result.name] = result.error
            moving.set_postfix_str(f"{slices / (time.perf_counter() - began):.0f} slices/s", refresh=False)
            # The failures of other processes come on top.
            moving.update(moving.n < moving.total)
    if predictor.compiled is not None:
        print(f"compiling took {predictor.compiled.seconds:.0f} s for {predictor.compiled.sizes} sizes of slices")
    if finished_before:
        print(f"{finished_before} cases were finished before (--overwrite does them again)")
    if world.rank:
        return 0  # the first process speaks for all: torchrun ends the others as soon as one fails
    if options.page and (todo.share is None or (Path(options.output) / PAGE_NAME).exists()):
        print(printable(f"to look at, in a browser: {Path(options.output) / PAGE_NAME}"))
    return report_failures(failures, len(todo.cases) + len(todo.problems))


def _share(text: str) -> Share:
    """As an option's type."""
    try:
        return Share.parse(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("share: ")) from None


def _described(report: dict[str, Any]) -> str:
    settings = report["settings"]
    by_reference = f" (reference for {', '.join(report['fallbacks'])})" if "fallbacks" in report else ""
    score = f"Agatston {report['agatston']:.1f}, " if "agatston" in report else ""
    return (
        f"{report['case']}: {report['lesion_count']} lesions, {amount(report['total_volume_ml'], 2)} mL, {score}"
        f"backend {settings['backend']}{by_reference}, {settings['precision']}"
    )
