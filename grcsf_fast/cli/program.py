"""The command line: ``grcsf-fast`` or ``python -m grcsf_fast``.

Exit codes:

- 0: all done.
- 1: some cases of a folder failed, the others are done; or a training stopped after its first step, with what was done
  on disk.
- 2: bad input or usage, nothing was done.
- 70: a bug of this program, with its traceback.
- 129, 130, 141, 143: ended by SIGHUP, Ctrl-C, a closed pipe or SIGTERM; what is written is whole.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..data.files import check_writable, find_cases, replace_when_done
from ..data.volumes import Preprocessing
from ..errors import ArgumentError, GrcsfError, UnfinishedError
from ..inference.folder import Plan, earlier_precision, plan, predict_folder
from ..inference.predictor import Predictor, versions
from ..networks.grcsf import GRCSF
from ..networks.mae import MaskedAutoencoder
from ..ops import triton
from ..ops.backends import backend_info
from ..ops.check import examine_all
from ..pretrained.bundle import (
    PACKAGED,
    Bundle,
    BundleError,
    ResidualMapSettings,
    check_channels,
    load_bundle,
    read_config,
)
from ..runtime.precision import PRECISIONS, choose_device
from ..runtime.processes import World, described_world, device_of, one_of_many, said_by_first
from ..runtime.progress import bar, busy, steps
from ..runtime.signals import terminable
from .options import Parser, joined, number, numbers, ratios

__all__ = ["main"]

UNFINISHED, BAD_INPUT, BUG, CLOSED_PIPE = 1, 2, 70, 141
OPTIONAL_PACKAGES = {"monai", "safetensors", "isal", "scipy", "tqdm", "matplotlib", "PIL", "nilearn"}
KERNELS_FAILED = 1
MAX_THREADS = 1024
AT_LEAST_1 = number(int, least=1)
# Of a synthetic subject in the training of a 2-D network. Whole subjects would be few at a time, and few are learnt by
# heart.
SLICES_A_SUBJECT = 32
# Share of the synthetic subjects with many lesions in the training of a network.
CROWDED = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options = _parser().parse_args(joined(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as ended:  # help was asked for, or usage is wrong and was said
        return int(ended.code or 0)
    keep_memory()
    # Lanes compute while one of them draws its picture in Python, for which they would else wait 5 ms at every op.
    sys.setswitchinterval(0.0005)
    try:
        with terminable():
            _check_alone(options)
            if getattr(options, "threads", None) is not None:
                torch.set_num_threads(options.threads)
            code = options.run(options)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except KeyboardInterrupt as error:
        print(str(error) or options.interrupted, file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    except BrokenPipeError:
        _close_output()
        return CLOSED_PIPE
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """Say what failed; the exit code."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in OPTIONAL_PACKAGES:
        print(f'error: the package {error.name!r} is missing: pip install "grcsf-fast[app]"', file=sys.stderr)
        return BAD_INPUT
    # PyTorch has no class of its own for the processor's memory.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        print(f"error: not enough memory, try a smaller --batch-size: {error}", file=sys.stderr)
        return BAD_INPUT
    # Warnings come here under -W error.
    if isinstance(error, GrcsfError | OSError | Warning):
        print(f"error: {error}", file=sys.stderr)
        return UNFINISHED if isinstance(error, UnfinishedError) else BAD_INPUT
    traceback.print_exception(error)
    print("error: this is a bug of grcsf-fast; please report it with the lines above", file=sys.stderr)
    return BUG


def _close_output() -> None:
    """Nobody reads any more; Python would complain when it flushes at its end."""
    with suppress(OSError, ValueError, AttributeError):  # no file at all, as in a notebook
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _check_alone(options: argparse.Namespace) -> None:
    """Commands that write the same files in every process are refused where there are several."""
    if options.command in ("predict", "info"):
        return
    world = described_world()
    if world.size > 1:
        raise ArgumentError(
            f"{options.command} works in one process, and this is number {world.rank} of {world.size} by RANK and "
            "WORLD_SIZE: start it without torchrun, or unset these variables"
        )


@contextmanager
def _given() -> Iterator[None]:
    """What is built from options alone: its complaints are about them."""
    try:
        yield
    except GrcsfError:
        raise
    except (ValueError, TypeError) as error:
        raise ArgumentError(str(error)) from error


def keep_memory(whole_volumes: bool = False) -> None:
    """Tell glibc to keep freed memory: fresh pages are slow, and the same large tensors come again and again.

    Whole volumes, from 32 MiB on, are given back all the same unless ``whole_volumes`` are kept, and lanes share two
    pools, so that a long run takes no more than a short one. It is process-wide, so a program does it and the library
    does not.
    """
    trim_threshold, top_pad, mmap_threshold, mmap_max, arena_max = -1, -2, -3, -4, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    mallopt(mmap_threshold, 2**25)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)
    mallopt(arena_max, 2)
    if whole_volumes:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="grcsf-fast",
        description="Lesion segmentation with global and regional feature compensation. Not for clinical use.",
        epilog="Exit codes: 0 done; 1 some cases failed and the others are done, or a training stopped on its way; "
        "2 bad input or usage, nothing was done; 70 a bug of this program; 129, 130, 141, 143 ended by SIGHUP, Ctrl-C, "
        "a closed pipe, SIGTERM.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_predict, _add_evaluate, _add_synthesize, _add_train_mae, _add_train, _add_info):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Any, text: str, interrupted: str = "what is written is whole"
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(run=run, interrupted=f"interrupted; {interrupted}")
    return command


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--threads",
        type=number(int, least=1, most=MAX_THREADS),
        metavar="N",
        default=argparse.SUPPRESS,
        help="processor threads (default: all, or what OMP_NUM_THREADS says, which torchrun sets to 1)",
    )


def _add_predict(commands: Any) -> None:
    command = _command(
        commands, "predict", _predict,
        "Segment a NIfTI volume, or every one in a folder. Finished cases of a folder are left as they are; under "
        "torchrun, processes share the cases.",
        "what is written is whole, the same command goes on from there",
    )  # fmt: skip
    command.add_argument("-i", "--input", required=True, metavar="FILE|FOLDER", help="a .nii or .nii.gz, or a folder")
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for masks, maps, pictures, reports")
    command.add_argument("-m", "--model", default="demo", help="a bundle's folder, or the name of a packaged one")
    command.add_argument("--batch-size", type=AT_LEAST_1, default=16, metavar="N", help="axial slices at once")
    command.add_argument("--backend", default="auto", help="of the two ops; see `grcsf-fast info`")
    command.add_argument(
        "--precision", choices=[*PRECISIONS, "auto"], default="auto",
        help="auto: bfloat16 where it is faster, measured once for a processor; a folder of results keeps its own",
    )  # fmt: skip
    command.add_argument(
        "--importance-threshold", type=number(float, least=0, most=1), metavar="P", default=argparse.SUPPRESS,
        help="skip patches scored below it (default: the bundle's)",
    )  # fmt: skip
    command.add_argument(
        "--compile", action="store_true", help="fuse the network by torch's compiler; pays in long runs"
    )
    command.add_argument("--no-maps", dest="maps", action="store_false", help="without residual maps")
    command.add_argument("--no-overlay", dest="overlay", action="store_false", help="without pictures")
    command.add_argument("--overwrite", action="store_true", help="do finished cases of a folder again")
    command.add_argument(
        "--memory", type=number(float, above=0), metavar="GIB", default=argparse.SUPPRESS,
        help="that the volumes of a folder at work take together (default: most of what is free)",
    )  # fmt: skip
    _add_device(command)


def _predict(options: argparse.Namespace) -> int:
    with _given():
        cases, problems = find_cases(options.input)
    check_writable(options.output)
    one = Path(options.input).is_file()
    source = Path(options.input).parent if one else Path(options.input)
    if source.resolve() == Path(options.output).resolve():
        raise ArgumentError(
            f"{options.output}: expected another folder than the input's, whose volumes it would replace"
        )
    for name in cases:
        places = [found.start() for found in re.finditer("_residual", name)]
        if of := [name[:place] for place in places if name[:place] in cases]:
            raise ArgumentError(f"{options.input}: expected no case named like a result of {of[0]}, found {name}")
    if one:
        (path,) = cases.values()
        return _predict_one(options, path)
    with one_of_many() as world:
        todo = plan(cases, problems, world)
        return _predict_folder(options, _folder_predictor(options, todo, world), todo, world)


def _predict_one(options: argparse.Namespace, path: Path) -> int:
    """One volume, for which processes need not meet."""
    world = World()
    with suppress(ArgumentError):
        world = described_world()
    if world.rank:
        print(f"process {world.rank} of {world.size}: one volume is work for process 0 alone", file=sys.stderr)
        return 0
    predictor = _predictor(options, load_bundle(options.model), world, options.precision)
    _say_precision(options, predictor.precision, predictor.precision_reason)
    prediction = predictor(path)
    with busy("saving"):
        prediction.save(options.output, maps=options.maps, overlay=options.overlay)
    print(_printable(f"{_described(prediction.report)}, {sum(prediction.seconds.values()):.1f} s"))
    return 0


def _folder_predictor(options: argparse.Namespace, todo: Plan, world: World) -> Predictor:
    """All processes, and the runs before this one of whose results the folder holds some, use the same precision."""
    bundle = load_bundle(options.model)
    if options.precision != "auto":
        return _predictor(options, bundle, world, options.precision)
    predictor = _predictor(options, bundle, world, "auto") if world.rank == 0 else None

    def settle() -> tuple[str, str]:
        earlier = None
        if not options.overwrite:
            earlier = earlier_precision(Path(options.output), sorted(todo.cases), predictor.settings())
        if earlier in (None, predictor.precision):
            return predictor.precision, predictor.precision_reason
        return earlier, f"as in the results in {options.output}"

    precision, reason = said_by_first(world, settle)
    if predictor is None or precision != predictor.precision:
        predictor = _predictor(options, bundle, world, precision)
    if world.rank == 0:
        _say_precision(options, precision, reason)
    return predictor


def _predictor(options: argparse.Namespace, bundle: Bundle, world: World, precision: str) -> Predictor:
    return Predictor(
        bundle, device_of(world, options.device), options.backend, options.batch_size,
        progress=Path(options.input).is_file(), precision=precision,
        importance_threshold=getattr(options, "importance_threshold", None), compiled=options.compile,
    )  # fmt: skip


def _say_precision(options: argparse.Namespace, precision: str, reason: str) -> None:
    if options.precision == "auto":
        print(_printable(f"precision {precision}: {reason}"))


def _predict_folder(
    options: argparse.Namespace,
    predictor: Predictor,
    todo: Plan,
    world: World,
) -> int:
    memory = getattr(options, "memory", None)
    # The other lanes' next operations wait for Python code, such as a picture's, no longer than this.
    sys.setswitchinterval(2e-4)
    began, slices_done = time.perf_counter(), 0
    with steps(len(todo.names) + len(todo.problems), 0, "cases") as moving:

        def done(name: str, report: dict[str, Any] | None, slices: int) -> None:
            nonlocal slices_done
            slices_done += slices
            if report is not None and slices and sys.stdout is not None:
                moving.write(_printable(_described(report)), file=sys.stdout)
            moving.set_postfix_str(f"{slices_done / (time.perf_counter() - began):.0f} slices/s", refresh=False)
            moving.update()

        outcome = predict_folder(
            predictor, todo, options.output, overwrite=options.overwrite, maps=options.maps, overlay=options.overlay,
            memory=None if memory is None else int(memory * 2**30), world=world, done=done,
        )  # fmt: skip
    if predictor.compiled is not None:
        print(f"compiling took {predictor.compiled.seconds:.0f} s for {predictor.compiled.sizes} sizes of slices")
    if outcome.finished_before:
        print(f"{outcome.finished_before} cases were finished before (--overwrite does them again)")
    if world.rank:
        return 0  # the first process speaks for all: torchrun ends the others as soon as one fails
    failures = {name: failure["error"] for name, failure in outcome.failures.items()}
    return _report_failures(failures, len(todo.cases) + len(todo.problems))


def _described(report: dict[str, Any]) -> str:
    settings = report["settings"]
    return (
        f"{report['case']}: {report['lesion_count']} lesions, {report['total_volume_ml']:.2f} mL, "
        f"backend {settings['backend']}, {settings['precision']}"
    )


def _printable(text: str) -> str:
    """What the terminal cannot show, such as names that are no UTF-8, as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _report_failures(failures: dict[str, str], total: int) -> int:
    if not failures:
        return 0
    print(f"{len(failures)} of {total} cases failed:", file=sys.stderr)
    for name, text in failures.items():
        print(f"  {name}: {text}", file=sys.stderr)
    return UNFINISHED


def _add_evaluate(commands: Any) -> None:
    command = _command(
        commands, "evaluate", _evaluate,
        "Compare predicted masks with the truth. A prediction that is missing or cannot be used, or is empty where the "
        "truth is not, counts as a Dice and a lesion-wise F1 of 0 and as a Hausdorff distance of the grid's "
        "diagonal; so does, in the distance, an empty truth alone. Other undefined figures are left out of the means, "
        "and each mean says how many. Voxels from half of a label's value up are lesion.",
    )  # fmt: skip
    command.add_argument("-p", "--predicted", required=True, metavar="FILE|FOLDER", help="predicted masks")
    command.add_argument("-t", "--truth", required=True, metavar="FILE|FOLDER", help="true masks of the same names")
    command.add_argument("-o", "--output", metavar="FOLDER", help="for cases.csv and summary.json; default: print only")
    command.add_argument("--min-lesion-ml", type=float, default=0.1, metavar="ML", help="smallest lesion that counts")


def _evaluate(options: argparse.Namespace) -> int:
    from ..evaluation.evaluate import evaluate_folders, predictions_without_truth, summarize, write_results

    if options.output is not None:
        check_writable(options.output)
    with busy("comparing", shown=Path(options.truth).is_file()):
        results, failures = evaluate_folders(options.predicted, options.truth, options.min_lesion_ml, bar("cases"))
    if failures and Path(options.truth).is_file():
        raise ArgumentError(next(iter(failures.values())))
    summary = summarize(results)
    for name, row in results.items():
        state = "".join(f"prediction {flag}, as if empty: " for flag in ("missing", "failed") if row[flag])
        figures = [f"{key} {value:.4g}" for key, value in row.items() if key not in ("missing", "failed")]
        print(_printable(f"{name}: {state}{', '.join(figures)}"))
    print(", ".join(f"{name} {value}" for name, value in summary.items() if isinstance(value, int)))
    for name, value in summary.items():
        if isinstance(value, dict):
            spread = ", ".join(f"{key} {value[key]:.4f}" for key in ("mean", "sd", "median"))
            counts = ", ".join(f"{key.replace('_', ' ')} {value[key]}" for key in value if isinstance(value[key], int))
            print(f"{name}: {spread}, {counts}")
    if "pooled_lesion_f1" in summary:
        print(f"pooled_lesion_f1: {summary['pooled_lesion_f1']:.4f}")
    without_truth = predictions_without_truth(options.predicted, options.truth)
    if without_truth:
        names = _printable(", ".join(without_truth))
        print(f"{len(without_truth)} predictions without a truth were not compared: {names}", file=sys.stderr)
    if options.output is not None and results:
        write_results(options.output, results, summary | {"without_truth": without_truth, "errors": failures})
    return _report_failures(failures, len(results.keys() | failures.keys()))


def _add_synthesize(commands: Any) -> None:
    command = _command(
        commands, "synthesize", _synthesize, "Draw synthetic subjects with stroke lesions and their exact masks."
    )
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="gets images/, masks/ and records/")
    command.add_argument("-n", "--number", type=AT_LEAST_1, default=1, help="of subjects")
    command.add_argument(
        "--seed", type=number(int, least=0), default=4_000_000, help="of the first subject; the next has the next"
    )
    command.add_argument("--spacing", type=number(float, above=0), default=1.0, metavar="MM", help="of the voxels")
    command.add_argument(
        "--contrast", choices=("random", "template"), default="random", help="tissue by tissue, or the real average's"
    )
    command.add_argument("--skull", choices=("random", "yes", "no"), default="random", help="a rim around the brain")


def _synthesize(options: argparse.Namespace) -> int:
    import nibabel as nib
    import numpy as np

    from ..synthesis.lesions import synthesize_subject
    from ..synthesis.template import load_template

    output = check_writable(options.output)
    with _given():
        template = load_template(options.spacing)
    skull = {"random": None, "yes": True, "no": False}[options.skull]
    seeds = range(options.seed, options.seed + options.number)
    for seed in bar("subjects")(seeds) if len(seeds) > 1 else seeds:
        with busy(f"drawing subject {seed}", shown=len(seeds) == 1):
            subject = synthesize_subject(template, seed, skull=skull, contrast=options.contrast)
        name = f"synthetic_{seed}"
        targets = [
            output / "images" / f"{name}.nii.gz",
            output / "masks" / f"{name}.nii.gz",
            output / "records" / f"{name}.json",
        ]
        with replace_when_done(*targets) as (image, mask, record):
            for path, data in ((image, subject.image.numpy()), (mask, subject.lesion.numpy().astype(np.uint8))):
                nifti = nib.Nifti1Image(data, subject.affine)
                nifti.header.set_xyzt_units("mm")
                nib.save(nifti, path)
            record.write_text(json.dumps(subject.record, indent=2) + "\n")
        print(
            _printable(f"{targets[0]}: ")
            + f"{len(subject.record['lesions'])} lesions, {subject.record['lesion_volume_ml']:.2f} mL"
        )
    return 0


_RESUMES = "the same command with --resume goes on from the checkpoint, or from the beginning if there is none yet"


def _add_training(command: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for log, curves, checkpoint, bundle")
    command.add_argument("-i", "--images", metavar="FOLDER", help="training volumes; without it synthetic subjects")
    command.add_argument("--initial", metavar="BUNDLE", help="start from its weights; its networks' sizes hold")
    command.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the output folder; with more --steps the "
        "learning rate follows the longer schedule from there on",
    )  # fmt: skip
    from ..training.train import TrainSettings

    for item in fields(TrainSettings):
        default = defaults.get(item.name, item.default)
        if default is None:
            continue
        flag = f"--{item.name.replace('_', '-')}"
        if isinstance(default, bool):
            command.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=_HELP[item.name])
            continue
        kind = str
        if isinstance(default, tuple):
            kind = numbers(AT_LEAST_1, (2, 3))
        elif not isinstance(default, str):
            kind = number(type(default))
        command.add_argument(flag, type=kind, default=default, help=_HELP[item.name])
    _add_device(command)


_HELP = {
    "steps": "optimiser steps",
    "batch_size": "crops a step",
    "crop_size": "edge lengths in voxels: two for axial slices, three for boxes",
    "crop_size_jitter": "each edge is longer or shorter by this in some steps; 0: never",
    "learning_rate": "peak of the cosine schedule",
    "weight_decay": "of AdamW",
    "warmup_steps": "steps of linear warm-up",
    "seed": "of everything random",
    "cache_size": "cases in memory",
    "replace_every": "steps after which one case in memory is replaced; 0: never",
    "lesion_fraction": "share of crops centred on lesion",
    "score_weight": "weight of the score loss",
    "augment": "all: random flips, affine and intensity changes; flips: left and right alone; none",
    "autocast": "auto: bfloat16 where it is faster, measured; bf16; off",
    "log_every": "steps between log lines",
    "validate_every": "steps between validations and checkpoints",
    "checkpoint_minutes": "at most, between two checkpoints",
}


def _add_preprocessing(command: argparse.ArgumentParser) -> None:
    given = argparse.SUPPRESS
    command.add_argument(
        "--spacing", type=numbers(number(float, above=0), (3,)), default=given, help="x,y,z in mm (default: 2,2,2)"
    )
    command.add_argument("--modality", choices=("mri", "ct"), default=given, help="intensity recipe (default: mri)")
    command.add_argument(
        "--hu-window", type=numbers(number(float), (2,)), default=given, help="low,high; CT only (default: -160,240)"
    )


def _add_train_mae(commands: Any) -> None:
    command = _command(commands, "train-mae", _train_mae, "Train the masked autoencoder.", _RESUMES)
    _add_training(
        command,
        {"crop_size_jitter": 16, "batch_size": 48, "learning_rate": 1e-3, "weight_decay": 0.05, "augment": "none",
         "cache_size": 32, "replace_every": 12, "steps": 4000, "warmup_steps": 200,
         "lesion_fraction": None, "score_weight": None},
    )  # fmt: skip
    _add_preprocessing(command)
    command.add_argument("--mask-ratios", type=ratios, default=(0.5, 0.75), help="masking ratios")
    command.add_argument("--rounds", type=AT_LEAST_1, default=1, help="maskings averaged in a residual map")
    for name, default in _MAE_DEFAULTS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=AT_LEAST_1, default=default, help="of the transformer")


# The demo bundle's autoencoder: 1.9 M parameters.
_MAE_DEFAULTS = {
    "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 6,
    "decoder_dim": 96, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip


def _train_mae(options: argparse.Namespace) -> int:
    from ..training.sampling import SEEDS_A_RUN, TRAINING_SEEDS, SyntheticSource, drawing_spacings
    from ..training.train import train_mae

    settings, device = _begin_training(options)
    initial = load_bundle(options.initial) if options.initial else None
    preprocessing = _preprocessing(options, initial)
    torch.manual_seed(settings.seed)
    if initial is not None:
        mae = initial.mae
        if mae is None:
            raise BundleError(f"{options.initial}: expected a bundle with an autoencoder, found none in it")
        check_channels(initial, options.initial)
    else:
        with _given():
            mae = MaskedAutoencoder(
                len(settings.crop_size), 1, **{name: getattr(options, name) for name in _MAE_DEFAULTS}
            )
    if options.images:
        source: Any = _folder_source(options.images, None, preprocessing)
    else:
        with _given():
            source = SyntheticSource(
                preprocessing,
                TRAINING_SEEDS + SEEDS_A_RUN * settings.seed,
                lesions=False,
                drawn_at=drawing_spacings(preprocessing.spacing[0]),
            )
    residual = ResidualMapSettings(options.mask_ratios, options.rounds, seed=0)
    card = _card(options, "healthy synthetic subjects" if not options.images else "volumes of a folder")
    folder = train_mae(
        options.output, source, mae, settings, preprocessing, residual, device, options.resume, card,
        initial.weights_sha256 if initial is not None else None,
    )  # fmt: skip
    print(_printable(f"wrote {folder}"))
    return 0


def _add_train(commands: Any) -> None:
    command = _command(commands, "train", _train, "Train the segmentation network.", _RESUMES)
    _add_training(command, {"crop_size_jitter": 16})
    command.add_argument("-l", "--labels", metavar="FOLDER", help="lesion masks of the names of the images")
    command.add_argument("--mae", metavar="FOLDER", help="bundle of train-mae; gives preprocessing and residual maps")
    command.add_argument(
        "--validation", type=number(int, least=0), default=6, metavar="N", help="cases held out for validation"
    )
    command.add_argument(
        "--features",
        type=numbers(AT_LEAST_1),
        default=(16, 32, 64, 128, 128),
        help="channels of each stage",
    )
    command.add_argument("--patch-size", type=AT_LEAST_1, default=4, help="of the RCU")
    command.add_argument(
        "--rcu-levels", type=numbers(number(int, least=0), range(9)), default=(1, 2),
        help="levels with an RCU; '' for none",
    )  # fmt: skip
    command.add_argument("--gcu", action=argparse.BooleanOptionalAction, default=True, help="with the GCU or without")
    command.add_argument("--downsample", choices=("conv", "avg", "max"), default="max", help="between the stages")
    _add_preprocessing(command)


def _train(options: argparse.Namespace) -> int:
    from ..training.sampling import (
        SEEDS_A_RUN,
        TRAINING_SEEDS,
        VALIDATION_SEEDS,
        FolderSource,
        SyntheticSource,
        drawing_spacings,
    )
    from ..training.train import train_network

    if bool(options.images) != bool(options.labels):
        raise ArgumentError("expected --images and --labels together, or neither for synthetic subjects")
    settings, device = _begin_training(options)
    initial = load_bundle(options.initial) if options.initial else None
    trained = load_bundle(options.mae) if options.mae else initial
    for bundle, name in ((initial, options.initial), (trained, options.mae or options.initial)):
        if bundle is not None:
            check_channels(bundle, name)
    preprocessing = _preprocessing(options, trained)
    residual = trained.residual_maps if trained is not None else ResidualMapSettings()
    torch.manual_seed(settings.seed)
    if initial is not None:
        network = initial.network
        if network is None:
            raise BundleError(f"{options.initial}: expected a bundle with a segmentation network, found none in it")
    else:
        with _given():
            network = GRCSF(
                len(settings.crop_size), 1, 1, options.features, options.patch_size, rcu_levels=options.rcu_levels,
                mask_ratios=residual.mask_ratios, gcu=options.gcu, downsample=options.downsample,
            )  # fmt: skip
    mae = None
    if network.rcu:
        mae = trained.mae if trained is not None else None
        if mae is None:
            raise ArgumentError("--mae: expected the bundle of an autoencoder for a network with RCU, got none")
        if network.mask_ratios != residual.mask_ratios:
            raise ArgumentError(
                f"--mae: expected ratios {network.mask_ratios}, those of the network, got {residual.mask_ratios}"
            )
    if options.images:
        everything = _folder_source(options.images, options.labels, preprocessing)
        shuffled = torch.randperm(len(everything), generator=torch.Generator().manual_seed(settings.seed))
        order = [everything.names[index] for index in shuffled.tolist()]
        held = order[: min(options.validation, len(order) // 2)]
        source: Any = FolderSource(options.images, options.labels, preprocessing, order[len(held) :])
        validating: Any = FolderSource(options.images, options.labels, preprocessing, held)
        count = len(held)
    else:
        slices = SLICES_A_SUBJECT if len(settings.crop_size) == 2 else None
        finer = drawing_spacings(preprocessing.spacing[0])
        first_seed = TRAINING_SEEDS + SEEDS_A_RUN * settings.seed
        with _given():
            source = SyntheticSource(preprocessing, first_seed, slices=slices, drawn_at=finer, crowded=CROWDED)
        count = options.validation
        validating = SyntheticSource(preprocessing, VALIDATION_SEEDS, spread=count, drawn_at=finer[:1])
    validation = [validating[index] for index in bar("reading validation cases")(range(count))]
    card = _card(options, "synthetic subjects with lesions" if not options.images else "image/mask pairs of a folder")
    folder = train_network(
        options.output,
        source,
        validation,
        network,
        mae,
        settings,
        preprocessing,
        residual,
        device,
        options.resume,
        card,
        initial.weights_sha256 if initial is not None else None,
    )
    print(_printable(f"wrote {folder}"))
    return 0


def _begin_training(options: argparse.Namespace) -> tuple[Any, torch.device]:
    """What can be said of a training before anything is read: settings, device, and whether it may write."""
    from ..training.checkpoint import check_output

    for flag, folder in (("--images", options.images), ("--labels", getattr(options, "labels", None))):
        if folder is not None and Path(folder).resolve() == Path(options.output).resolve():
            raise ArgumentError(f"--output: expected another folder than that of {flag}, got {folder} for both")
    settings, device = _settings(options), choose_device(options.device)
    check_output(options.output, options.resume)
    return settings, device


def _folder_source(images: str, labels: str | None, preprocessing: Preprocessing) -> Any:
    """The cases of a folder, each of which was read once: none of them stops the training later."""
    from ..training.sampling import FolderSource

    with _given():
        source = FolderSource(images, labels, preprocessing)
    survey = source.survey(bar("checking cases"))
    print(_printable(survey.text() if labels is not None else f"{survey.cases} cases"))
    return source


def _settings(options: argparse.Namespace) -> Any:
    from ..training.sampling import MAX_TRAINING_SEED
    from ..training.train import TrainSettings

    if not 0 <= options.seed <= MAX_TRAINING_SEED:
        raise ArgumentError(f"--seed: expected 0 to {MAX_TRAINING_SEED}, got {options.seed}")
    known = {item.name for item in fields(TrainSettings)}
    return TrainSettings(**{name: value for name, value in vars(options).items() if name in known})


def _preprocessing(options: argparse.Namespace, bundle: Bundle | None) -> Preprocessing:
    """The options', or those of a bundle whose networks are used on; both would contradict each other."""
    given = {name: getattr(options, name) for name in ("spacing", "modality", "hu_window") if hasattr(options, name)}
    if bundle is None:
        with _given():
            return Preprocessing(**given)
    if given:
        raise ArgumentError(f"expected no --{next(iter(given))} beside --mae or --initial, whose preprocessing holds")
    return bundle.preprocessing


def _card(options: argparse.Namespace, data: str) -> dict[str, Any]:
    given = {
        name: value for name, value in vars(options).items()
        if name not in ("run", "output", "images", "labels", "mae", "initial", "resume", "device")
    }  # fmt: skip
    return {
        "trained_on": data,
        "command": options.command,
        "options": given,
        "versions": versions(),
        "notice": "Research software; not a medical device and not for clinical use.",
    }


def _add_info(commands: Any) -> None:
    command = _command(commands, "info", _info, "List backends, packaged bundles and versions.")
    command.add_argument(
        "--check",
        action="store_true",
        help="also run every kernel that can run here on small inputs against the reference; exit code 1 if one fails",
    )


def _info(options: argparse.Namespace) -> int:
    for name, backend in backend_info().items():
        state = "can run" if backend["available"] else f"cannot run: {backend['reason']}"
        print(f"backend {name}: {state}; {backend['description']}")
    print(f"device: {choose_device('auto')}, {torch.get_num_threads()} threads")
    for path in sorted(PACKAGED.glob("*/config.json")):
        print(f"bundle {path.parent.name}: SHA-256 {read_config(path.parent)['weights_sha256']}")
    for package, version in versions().items():
        print(f"{package} {version}")
    return _check_kernels() if options.check else 0


def _check_kernels() -> int:
    """The table of ``info --check``."""
    count = failed = 0
    if triton.interpreted():
        print("Triton's interpreter multiplies bfloat16 numbers as bits; that alone is no fault of a kernel")
    print(f"{'backend':8} {'result':7} {'error':8} {'allowed':8} kernel")
    for kernel, result in examine_all():
        count += 1
        if isinstance(result, Exception):
            state, error, allowed, where = "FAILED", "-", "-", f": {type(result).__name__}: {result}"
        else:
            state, where = ("ok", "") if result.passed else ("FAILED", f": {result.tensor}")
            error, allowed = f"{result.error:.1e}", f"{result.tolerance:.1e}"
        failed += state == "FAILED"
        print(f"{kernel.backend:8} {state:7} {error:8} {allowed:8} {kernel}{where}", flush=True)
    print(f"{count} kernels checked, {failed} failed")
    return KERNELS_FAILED if failed else 0
