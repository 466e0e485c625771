"""Calibrate a trained bundle and store it in the package as ``demo``, in half precision; ends ``make weights``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.calibrate import calibrate, calibrate_importance, subjects
from grcsf_fast.bundle import PACKAGED, load_bundle, save_bundle

CARD = """# Demo weights

A 2-D GRCSF network and masked autoencoder for stroke lesions on T1-weighted MRI, a demonstration of the software.

- **Not a medical device and not for clinical use.** Nothing measured here says anything about patients.
- Trained on synthetic subjects alone: random warps and contrasts of one averaged head (ICBM 2009a T1 with its tissue
  maps), with synthetic dark lesions, 0.01 to 500 mL, with and without a skull-like rim. No scan of a person with a
  lesion was seen. The autoencoder saw the same kind of subjects without lesions.
- Input: one T1-weighted head volume, any orientation and spacing, stripped or with skull. Axial slices at 2 mm.
- On 24 held-out synthetic subjects: mean Dice 0.56, 0.77 with 5 mL of lesion or more (README, "Measured").
- What to expect: many lesions below 1 mL are missed, and some up to 8 mL; other dark things
  that the synthesizer does not draw (white-matter disease, wide perivascular spaces, surgery, artefacts) may be marked.
- `make weights` trains them again from nothing; `config.json` holds every setting and the hash of the weights;
  `make held-out` measures them, last results in `benchmarks/results/held_out.json`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="folder of the trained bundle")
    options = parser.parse_args()
    bundle = replace(load_bundle(options.bundle), mirror=True, zooms=(1.0, 1.1))
    cases = subjects(bundle)
    bundle = calibrate_importance(calibrate(bundle, cases), cases)
    folder = save_bundle(bundle, PACKAGED / "demo", dtype=torch.float16)
    (folder / "README.md").write_text(CARD)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
