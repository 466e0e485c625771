"""The command line: ``grcsf-fast`` or ``python -m grcsf_fast``.

Exit codes: 0 all done; 1 some cases of a folder failed, the others are done; 2 bad input, nothing written; 130 and 143
interrupted by Ctrl-C and SIGTERM, what is written is whole.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .batch import Plan, Share, device_of, one_of_many, plan, predict_folder
from .bundle import PACKAGED, Bundle, BundleError, ResidualSettings, load_bundle, read_config
from .data.files import check_writable, find_cases, replace_when_done
from .data.volumes import Preprocessing
from .networks.grcsf import GRCSF
from .networks.mae import MaskedAutoencoder
from .ops import triton
from .ops.backends import BackendUnavailableError, backend_info
from .ops.check import examine_all
from .predict import PRECISIONS, Predictor, choose_device, versions
from .progress import bar, busy, steps

__all__ = ["main"]

CASES_FAILED, BAD_INPUT = 1, 2
KERNELS_FAILED = 1
INTERRUPTED, TERMINATED = 130, 143  # as a shell counts signals
# Of a synthetic subject in the training of a 2-D network. Whole subjects would be few at a time, and few are learnt by
# heart.
SLICES_A_SUBJECT = 32
# Share of the synthetic subjects with many lesions in the training of a network.
CROWDED = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    keep_memory()
    # Lanes compute while one of them draws its picture in Python, for which they would else wait 5 ms at every op.
    sys.setswitchinterval(0.0005)
    try:
        threads = getattr(options, "threads", None)
        if threads is not None:
            if threads < 1:
                raise ValueError(f"--threads: expected 1 or more, got {threads}")
            torch.set_num_threads(threads)
        return options.run(options)
    except ModuleNotFoundError as error:
        print(f'error: the package {error.name!r} is missing: pip install "grcsf-fast[app]"', file=sys.stderr)
    # VolumeError, BundleError and TrainError are ValueErrors.
    except (BackendUnavailableError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt as error:
        print("interrupted; what is written is whole, the same command goes on from there", file=sys.stderr)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    # Python's own exit code for these is 1, which here means that the other cases are done.
    except Exception:
        traceback.print_exc()
    return BAD_INPUT


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
    parser = argparse.ArgumentParser(
        prog="grcsf-fast",
        description="Lesion segmentation with global and regional feature compensation. Not for clinical use.",
        epilog="Exit codes: 0 done; 1 some cases failed, the others are done; 2 bad input, nothing written; 130, 143 "
        "interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_predict, _add_evaluate, _add_synthesize, _add_train_mae, _add_train, _add_info):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(run=run)
    return command


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--threads",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="processor threads (default: all, or what OMP_NUM_THREADS says, which torchrun sets to 1)",
    )


def _add_predict(commands: Any) -> None:
    command = _command(
        commands, "predict", _predict,
        "Segment a NIfTI volume, or every one in a folder. Finished cases of a folder are left as they are; under "
        "torchrun, processes share the cases.",
    )  # fmt: skip
    command.add_argument("-i", "--input", required=True, metavar="FILE|FOLDER", help="a .nii or .nii.gz, or a folder")
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for masks, maps, pictures, reports")
    command.add_argument("-m", "--model", default="demo", help="a bundle's folder, or the name of a packaged one")
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="axial slices at once")
    command.add_argument("--backend", default="auto", help="of the two ops; see `grcsf-fast info`")
    command.add_argument(
        "--precision", choices=[*PRECISIONS, "auto"], default="auto",
        help="auto: bfloat16 where the hardware multiplies it, else float32",
    )  # fmt: skip
    command.add_argument(
        "--importance-threshold", type=float, metavar="P", default=argparse.SUPPRESS,
        help="skip patches scored below it (default: the bundle's)",
    )  # fmt: skip
    command.add_argument(
        "--compile", action="store_true", help="fuse the network by torch's compiler; pays in long runs"
    )
    command.add_argument("--no-maps", dest="maps", action="store_false", help="without residual maps")
    command.add_argument("--no-overlay", dest="overlay", action="store_false", help="without pictures")
    command.add_argument("--overwrite", action="store_true", help="do finished cases of a folder again")
    command.add_argument(
        "--memory", type=float, metavar="GIB", default=argparse.SUPPRESS,
        help="that the volumes of a folder at work take together (default: most of what is free)",
    )  # fmt: skip
    _add_device(command)


def _predict(options: argparse.Namespace) -> int:
    cases, problems = find_cases(options.input)
    check_writable(options.output)
    one = Path(options.input).is_file()
    source = Path(options.input).parent if one else Path(options.input)
    if source.resolve() == Path(options.output).resolve():
        raise ValueError(f"{options.output}: expected another folder than the input's, whose volumes it would replace")
    for name in cases:
        places = [found.start() for found in re.finditer("_residual", name)]
        if of := [name[:place] for place in places if name[:place] in cases]:
            raise ValueError(f"{options.input}: expected no case named like a result of {of[0]}, found {name}")
    memory = getattr(options, "memory", None)
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory: expected GiB above 0, got {memory}")
    with one_of_many() as share:
        predictor = Predictor.from_pretrained(
            options.model, device_of(share, options.device), options.backend, options.batch_size, progress=one,
            precision=options.precision, importance_threshold=getattr(options, "importance_threshold", None),
            compiled=options.compile,
        )  # fmt: skip
        if one:
            if share.rank:
                return 0  # one volume is the first process's
            (path,) = cases.values()
            prediction = predictor(path)
            with busy("saving"):
                prediction.save(options.output, maps=options.maps, overlay=options.overlay)
            seconds = sum(prediction.seconds.values())
            print(f"{_described(prediction.report)}, {seconds:.1f} s")
            return 0
        return _predict_folder(options, predictor, plan(cases, problems, share), share, memory)


def _predict_folder(
    options: argparse.Namespace,
    predictor: Predictor,
    todo: Plan,
    share: Share,
    memory: float | None,
) -> int:
    # The other lanes' next operations wait for Python code, such as a picture's, no longer than this.
    sys.setswitchinterval(2e-4)
    began, slices_done = time.perf_counter(), 0
    with steps(len(todo.names) + len(todo.problems), 0, "cases") as moving:

        def done(name: str, report: dict[str, Any] | None, slices: int) -> None:
            nonlocal slices_done
            slices_done += slices
            if report is not None and slices:
                moving.write(_printable(_described(report)), file=sys.stdout)
            moving.set_postfix_str(f"{slices_done / (time.perf_counter() - began):.0f} slices/s", refresh=False)
            moving.update()

        with _terminable():
            outcome = predict_folder(
                predictor, todo, options.output, overwrite=options.overwrite, maps=options.maps,
                overlay=options.overlay, memory=None if memory is None else int(memory * 2**30), share=share, done=done,
            )  # fmt: skip
    if predictor.compiled is not None:
        print(f"compiling took {predictor.compiled.seconds:.0f} s for {predictor.compiled.sizes} sizes of slices")
    if outcome.finished_before:
        print(f"{outcome.finished_before} cases were finished before (--overwrite does them again)")
    if share.rank:
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
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, ends the block as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _report_failures(failures: dict[str, str], total: int) -> int:
    if not failures:
        return 0
    print(f"{len(failures)} of {total} cases failed:", file=sys.stderr)
    for name, text in failures.items():
        print(f"  {name}: {text}", file=sys.stderr)
    return CASES_FAILED


def _add_evaluate(commands: Any) -> None:
    command = _command(commands, "evaluate", _evaluate, "Compare predicted masks with the truth.")
    command.add_argument("-p", "--predicted", required=True, metavar="FILE|FOLDER", help="predicted masks")
    command.add_argument("-t", "--truth", required=True, metavar="FILE|FOLDER", help="true masks of the same names")
    command.add_argument("-o", "--output", metavar="FOLDER", help="for cases.csv and summary.json; default: print only")
    command.add_argument("--min-lesion-ml", type=float, default=0.1, metavar="ML", help="smallest lesion that counts")


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluate import evaluate_folders, summarize, write_results

    if options.output is not None:
        check_writable(options.output)
    with busy("comparing", shown=Path(options.truth).is_file()):
        results, failures = evaluate_folders(options.predicted, options.truth, options.min_lesion_ml, bar("cases"))
    if failures and Path(options.truth).is_file():
        raise ValueError(next(iter(failures.values())))
    summary = summarize(results)
    for name, row in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"cases {summary['cases']}")
    for name, value in summary.items():
        if isinstance(value, dict):
            print(
                f"{name}: mean {value['mean']:.4f}, sd {value['sd']:.4f}, median {value['median']:.4f}, n {value['n']}"
            )
    if "pooled_lesion_f1" in summary:
        print(f"pooled_lesion_f1: {summary['pooled_lesion_f1']:.4f}")
    if options.output is not None and results:
        write_results(options.output, results, summary)
    return _report_failures(failures, len(results) + len(failures))


def _add_synthesize(commands: Any) -> None:
    command = _command(
        commands, "synthesize", _synthesize, "Draw synthetic subjects with stroke lesions and their exact masks."
    )
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="gets images/, masks/ and records/")
    command.add_argument("-n", "--number", type=int, default=1, help="of subjects")
    command.add_argument("--seed", type=int, default=4_000_000, help="of the first subject; the next has the next")
    command.add_argument("--spacing", type=float, default=1.0, metavar="MM", help="of the voxels")
    command.add_argument(
        "--contrast", choices=("random", "template"), default="random", help="tissue by tissue, or the real average's"
    )
    command.add_argument("--skull", choices=("random", "yes", "no"), default="random", help="a rim around the brain")


def _synthesize(options: argparse.Namespace) -> int:
    import nibabel as nib
    import numpy as np

    from .data.lesions import synthesize_subject
    from .data.template import load_template

    if options.number < 1 or options.seed < 0:
        raise ValueError(
            f"expected a number of 1 or more and a seed of 0 or more, got {options.number}, {options.seed}"
        )
    output = check_writable(options.output)
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
        print(f"{targets[0]}: {len(subject.record['lesions'])} lesions, {subject.record['lesion_volume_ml']:.2f} mL")
    return 0


def _numbers(kind: type) -> Any:
    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(",") if part)

    parse.__name__ = f"comma-separated {kind.__name__}s"
    return parse


def _add_training(command: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="for log, curves, checkpoint, bundle")
    command.add_argument("-i", "--images", metavar="FOLDER", help="training volumes; without it synthetic subjects")
    command.add_argument("--initial", metavar="BUNDLE", help="start from its weights; its networks' sizes hold")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    from .train import TrainSettings

    for item in fields(TrainSettings):
        default = defaults.get(item.name, item.default)
        if default is None:
            continue
        flag = f"--{item.name.replace('_', '-')}"
        if isinstance(default, bool):
            command.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=_HELP[item.name])
            continue
        kind = _numbers(int) if isinstance(default, tuple) else type(default)
        command.add_argument(flag, type=kind, default=default, help=_HELP[item.name])
    _add_device(command)


_HELP = {
    "steps": "optimiser steps",
    "batch_size": "crops a step",
    "crop": "edge lengths in voxels: two for axial slices, three for boxes",
    "crop_jitter": "each edge is longer or shorter by this in some steps; 0: never",
    "learning_rate": "peak of the cosine schedule",
    "weight_decay": "of AdamW",
    "warmup": "steps of linear warm-up",
    "seed": "of everything random",
    "pool_size": "cases in memory",
    "refresh": "steps after which one case in memory is replaced; 0: never",
    "lesion_share": "share of crops centred on lesion",
    "score_weight": "weight of the score loss",
    "augment": "all: random flips, affine and intensity changes; flips: left and right alone; none",
    "autocast": "auto: bfloat16 where the hardware multiplies it; bf16; off",
    "log_every": "steps between log lines",
    "validate_every": "steps between validations and checkpoints",
}


def _add_preprocessing(command: argparse.ArgumentParser) -> None:
    given = argparse.SUPPRESS
    command.add_argument("--spacing", type=_numbers(float), default=given, help="x,y,z in mm (default: 2,2,2)")
    command.add_argument("--modality", choices=("mri", "ct"), default=given, help="intensity recipe (default: mri)")
    command.add_argument(
        "--hu-window", type=_numbers(float), default=given, help="low,high; CT only (default: -160,240)"
    )


def _add_train_mae(commands: Any) -> None:
    command = _command(commands, "train-mae", _train_mae, "Train the masked autoencoder.")
    _add_training(
        command,
        {"crop_jitter": 16, "batch_size": 48, "learning_rate": 1e-3, "weight_decay": 0.05, "augment": "none",
         "pool_size": 32, "refresh": 12, "steps": 4000, "warmup": 200, "lesion_share": None, "score_weight": None},
    )  # fmt: skip
    _add_preprocessing(command)
    command.add_argument("--ratios", type=_numbers(float), default=(0.5, 0.75), help="masking ratios")
    command.add_argument("--rounds", type=int, default=1, help="maskings averaged in a residual map")
    for name, default in _MAE_DEFAULTS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="of the transformer")


# The demo bundle's autoencoder: 1.9 M parameters.
_MAE_DEFAULTS = {
    "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 6,
    "decoder_dim": 96, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip


def _train_mae(options: argparse.Namespace) -> int:
    from .data.datasets import SEEDS_A_RUN, TRAINING_SEEDS, FolderSource, SyntheticSource, drawing_spacings
    from .train import train_mae

    settings, device = _settings(options), choose_device(options.device)
    initial = load_bundle(options.initial) if options.initial else None
    preprocessing = _preprocessing(options, initial)
    torch.manual_seed(settings.seed)
    if initial is not None:
        mae = initial.mae
        if mae is None:
            raise BundleError(f"{options.initial}: expected a bundle with an autoencoder, found none in it")
    else:
        mae = MaskedAutoencoder(len(settings.crop), 1, **{name: getattr(options, name) for name in _MAE_DEFAULTS})
    if options.images:
        source: Any = FolderSource(options.images, None, preprocessing)
    else:
        source = SyntheticSource(
            preprocessing,
            TRAINING_SEEDS + SEEDS_A_RUN * settings.seed,
            lesions=False,
            drawn_at=drawing_spacings(preprocessing.spacing[0]),
        )
    residual = ResidualSettings(options.ratios, options.rounds, seed=0)
    card = _card(options, "healthy synthetic subjects" if not options.images else "volumes of a folder")
    folder = train_mae(options.output, source, mae, settings, preprocessing, residual, device, options.resume, card)
    print(f"wrote {folder}")
    return 0


def _add_train(commands: Any) -> None:
    command = _command(commands, "train", _train, "Train the segmentation network.")
    _add_training(command, {"crop_jitter": 16})
    command.add_argument("-l", "--labels", metavar="FOLDER", help="lesion masks of the names of the images")
    command.add_argument("--mae", metavar="FOLDER", help="bundle of train-mae; gives preprocessing and residual maps")
    command.add_argument("--validation", type=int, default=6, metavar="N", help="cases held out for validation")
    command.add_argument(
        "--features", type=_numbers(int), default=(16, 32, 64, 128, 128), help="channels of each stage"
    )
    command.add_argument("--patch-size", type=int, default=4, help="of the RCU")
    command.add_argument("--rcu-levels", type=_numbers(int), default=(1, 2), help="levels with an RCU; '' for none")
    command.add_argument("--gcu", action=argparse.BooleanOptionalAction, default=True, help="with the GCU or without")
    command.add_argument("--downsample", choices=("conv", "avg", "max"), default="max", help="between the stages")
    _add_preprocessing(command)


def _train(options: argparse.Namespace) -> int:
    from .data.datasets import (
        SEEDS_A_RUN,
        TRAINING_SEEDS,
        VALIDATION_SEEDS,
        FolderSource,
        SyntheticSource,
        drawing_spacings,
    )
    from .train import train_network

    if bool(options.images) != bool(options.labels):
        raise ValueError("expected --images and --labels together, or neither for synthetic subjects")
    settings, device = _settings(options), choose_device(options.device)
    initial = load_bundle(options.initial) if options.initial else None
    trained = load_bundle(options.mae) if options.mae else initial
    preprocessing = _preprocessing(options, trained)
    residual = trained.residual if trained is not None else ResidualSettings()
    torch.manual_seed(settings.seed)
    if initial is not None:
        network = initial.network
        if network is None:
            raise BundleError(f"{options.initial}: expected a bundle with a segmentation network, found none in it")
    else:
        network = GRCSF(
            len(settings.crop), 1, 1, options.features, options.patch_size, rcu_levels=options.rcu_levels,
            mask_ratios=residual.ratios, gcu=options.gcu, downsample=options.downsample,
        )  # fmt: skip
    mae = None
    if network.rcu:
        mae = trained.mae if trained is not None else None
        if mae is None:
            raise ValueError("--mae: expected the bundle of an autoencoder for a network with RCU, got none")
        if network.mask_ratios != residual.ratios:
            raise ValueError(
                f"--mae: expected ratios {network.mask_ratios}, those of the network, got {residual.ratios}"
            )
    if options.images:
        everything = FolderSource(options.images, options.labels, preprocessing)
        shuffled = torch.randperm(len(everything), generator=torch.Generator().manual_seed(settings.seed))
        order = [everything.names[index] for index in shuffled.tolist()]
        held = order[: min(options.validation, len(order) // 2)]
        source: Any = FolderSource(options.images, options.labels, preprocessing, order[len(held) :])
        validating: Any = FolderSource(options.images, options.labels, preprocessing, held)
        count = len(held)
    else:
        slices = SLICES_A_SUBJECT if len(settings.crop) == 2 else None
        finer = drawing_spacings(preprocessing.spacing[0])
        source = SyntheticSource(
            preprocessing, TRAINING_SEEDS + SEEDS_A_RUN * settings.seed, slices=slices, drawn_at=finer, crowded=CROWDED
        )
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
    )
    print(f"wrote {folder}")
    return 0


def _settings(options: argparse.Namespace) -> Any:
    from .data.datasets import MAX_TRAINING_SEED
    from .train import TrainSettings

    if not 0 <= options.seed <= MAX_TRAINING_SEED:
        raise ValueError(f"--seed: expected 0 to {MAX_TRAINING_SEED}, got {options.seed}")
    known = {item.name for item in fields(TrainSettings)}
    return TrainSettings(**{name: value for name, value in vars(options).items() if name in known})


def _preprocessing(options: argparse.Namespace, bundle: Bundle | None) -> Preprocessing:
    """The options', or those of a bundle whose networks are used on; both would contradict each other."""
    given = {name: getattr(options, name) for name in ("spacing", "modality", "hu_window") if hasattr(options, name)}
    if bundle is None:
        return Preprocessing(**given)
    if given:
        raise ValueError(f"expected no --{next(iter(given))} beside --mae or --initial, whose preprocessing holds")
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
