"""Calibrate a trained bundle and store it in the package as ``demo``, in half precision; ends ``make weights``.

``--card`` writes the bundle's card alone, with the figures of the last ``make held-out``.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibrate import calibrate, calibrate_importance, subjects
from grcsf_fast.networks.weights import PACKAGED
from grcsf_fast.pretrained.bundle import load_bundle, read_config, save_bundle

RESULTS = Path(__file__).parent / "results" / "held_out.json"
SMALL_ML = 1.0
HEALTHY = 12

CARD = """# Demo weights

A 2-D GRCSF network and masked autoencoder for stroke lesions on T1-weighted MRI, a demonstration of the software.

- **Not a medical device and not for clinical use.** Nothing measured here says anything about patients.
- Trained on synthetic subjects alone: random warps and contrasts of one averaged head (ICBM 2009a T1 with its tissue
  maps), with synthetic dark lesions, 0.01 to 500 mL, with and without a skull-like rim. No scan of a person with a
  lesion was seen. The autoencoder saw the same kind of subjects without lesions.
- Input: one T1-weighted head volume, any orientation and spacing, stripped or with skull. Axial slices at 2 mm.
{figures}
- Other dark things that the synthesizer does not draw (white-matter disease, wide perivascular spaces, surgery,
  artefacts) may be marked.
- Trained on the frozen synthesizer, `benchmarks/synthesizer_2025.py`; `make weights` trains on the present one and
  gives other weights. `config.json` holds every setting and the hash of the weights; `make held-out` measures them and
  writes the figures above from `benchmarks/results/held_out.json`.
"""


def card(weights_sha256: str, results: Mapping[str, Any] | None) -> str:
    """The bundle's ``README.md``.

    Args:
        weights_sha256: hash of the weights.
        results: of ``benchmarks/held_out.py``; those of other weights do not count.
    """
    if results is None or results["weights_sha256"] != weights_sha256:
        return CARD.format(figures="- Not measured yet.")
    large_name = next(name for name in results["summaries"] if name != "all cases")
    everything, large = (results["summaries"][name]["dice"]["mean"] for name in ("all cases", large_name))
    rows = results["cases"].values()
    small = [row for row in rows if row["truth_ml"] < SMALL_ML]
    missed = [row for row in rows if row["dice"] == 0]
    figures = [
        f"On {len(rows)} held-out synthetic subjects ({results['date']}): mean Dice {everything:.3f}, {large:.3f} with "
        f"{large_name} of lesion."
    ]
    if missed:
        small_missed = sum(row in missed for row in small)
        figures.append(
            f"Nothing of the lesions was found in {len(missed)} of them, {small_missed} of which had less than "
            f"{SMALL_ML:g} mL (of {len(small)} such subjects); the largest had "
            f"{max(row['truth_ml'] for row in missed):.1f} mL."
        )
    lines = [textwrap.fill(figure, 118, initial_indent="- ", subsequent_indent="  ") for figure in figures]
    return CARD.format(figures="\n".join(lines))


def write_card() -> Path:
    """The card of the bundle in the package."""
    folder = PACKAGED / "demo"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    path = folder / "README.md"
    path.write_text(card(read_config(folder)["weights_sha256"], results))
    return path


def ship(trained: Path) -> Path:
    """Calibrate and store; returns the folder in the package."""
    bundle = replace(load_bundle(trained), tta_flip=True, tta_scales=(1.0, 1.1))
    cases = subjects(bundle)
    healthy = subjects(bundle, HEALTHY, lesions=False)
    bundle = calibrate_importance(calibrate(bundle, cases, healthy), cases)
    return save_bundle(bundle, PACKAGED / "demo", dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="folder of the trained bundle")
    parser.add_argument("--card", action="store_true", help="write the card alone")
    options = parser.parse_args()
    if options.card == (options.bundle is not None):
        parser.error("expected a bundle's folder, or --card")
    if options.bundle is not None:
        folder = ship(options.bundle)
        write_card()
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 2**20:.1f} MiB")
    else:
        print(write_card())


if __name__ == "__main__":
    main()
