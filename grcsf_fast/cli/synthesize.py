"""``grcsf-fast synthesize``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..data.files import check_writable, replace_when_done
from ..runtime.progress import bar, busy
from .options import number
from .shared import AT_LEAST_1, about_arguments, new_command, printable

__all__ = ["add"]


def add(commands: Any) -> None:
    command = new_command(
        commands, "synthesize", run, "Draw synthetic subjects with stroke lesions and their exact masks."
    )
    command.add_argument("-o", "--output", required=True, metavar="FOLDER", help="gets images/, masks/ and records/")
    command.add_argument("-n", "--number", type=AT_LEAST_1, default=1, help="number of subjects")
    command.add_argument(
        "--seed", type=number(int, least=0), default=4_000_000, help="of the first subject; each further one adds 1"
    )
    command.add_argument("--spacing", type=number(float, above=0), default=1.0, metavar="MM", help="of the voxels")
    command.add_argument(
        "--contrast",
        choices=("random", "template", "t1", "t2", "flair", "pd"),
        default="random",
        help="random: drawn tissue by tissue, a quarter like T2, FLAIR or PD, the others like T1, as the names of "
        "sequences ask for; template: the real average's",
    )
    command.add_argument("--skull", choices=("random", "yes", "no"), default="random", help="a rim around the brain")


def run(options: argparse.Namespace) -> int:
    import nibabel as nib
    import numpy as np

    from ..synthesis.subjects import synthesize_subject
    from ..synthesis.template import load_template

    output = check_writable(options.output)
    with about_arguments():
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
            printable(f"{targets[0]}: ")
            + f"{len(subject.record['lesions'])} lesions, {subject.record['lesion_volume_ml']:.2f} mL"
        )
    return 0
