"""Calibrate a trained bundle and store it in the package as ``demo``, in half precision; ends ``make weights``.

``--average SHARE`` takes so much of the trained weights and the rest of the packaged ones from which they were trained.
``--card`` writes the bundle's card alone, with the figures of the last ``make held-out``.
"""

from __future__ import annotations

import argparse
import copy
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibrate import calibrated
from benchmarks.held_out import decided_by
from grcsf_fast.networks.weights import PACKAGED
from grcsf_fast.pretrained.bundle import Bundle, load_bundle, save_bundle

RESULTS = Path(__file__).parent / "results"
# Of held-out subjects, see benchmarks/held_out.py.
KINDS = {
    "old": "the frozen synthesizer",
    "new": "the package's synthesizer",
    "validation": "a generator that no training uses",
}

CARD = """# Demo weights

A 2-D GRCSF network and masked autoencoder for stroke lesions on T1-weighted MRI, a demonstration of the software.

- **Not a medical device and not for clinical use.** Nothing measured here says anything about patients.
- Trained on synthetic subjects alone: random warps and contrasts of one averaged head (ICBM 2009a T1 with its tissue
  maps), with synthetic lesions, 0.01 to 500 mL, with and without a skull-like rim. No scan of a person with a lesion
  was seen. In the last training three in four subjects came from the package's synthesizer, with strokes of several
  stages, distractors and, in half of them, other contrasts than T1; one in four from the frozen synthesizer,
  `benchmarks/synthesizer_2025.py`, with dark lesions alone. The autoencoder saw heads of the frozen one, healthy ones.
{history}
- Input: one T1-weighted head volume, any orientation and spacing, stripped or with skull. Axial slices at 2 mm.
{figures}
- Other things than lesions (white-matter disease, wide perivascular spaces, surgery, artefacts) may be marked.
- `config.json` holds the settings of the last training and the hash of the weights;
  `make held-out` measures them and writes the figures above from `benchmarks/results/held_out*.json`.
"""


def card(bundle: Bundle, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The bundle's ``README.md``.

    Args:
        bundle: as it was read; its card has the history of the trainings.
        results: of ``benchmarks/held_out.py`` by kind of subjects; those of other weights or thresholds do not count.
    """
    these = bundle.weights_sha256, decided_by(bundle)
    measured = {
        kind: found for kind, found in results.items() if (found["weights_sha256"], found["decided_by"]) == these
    }
    figures = [
        figure for kind, title in KINDS.items() if kind in measured for figure in _figures(title, measured[kind])
    ]
    history = f"Trainings of the network, each from the weights of the one before: {'; '.join(bundle.card['history'])}."
    trained, *lines = (
        textwrap.fill(line, 118, initial_indent="- ", subsequent_indent="  ") for line in (history, *figures)
    )
    return CARD.format(history=trained, figures="\n".join(lines or ["- Not measured yet."]))


def _figures(title: str, found: Mapping[str, Any]) -> Iterator[str]:
    large_name = next(name for name in found["summaries"] if name != "all cases")
    (dice, f1), (large, _) = (
        (found["summaries"][name]["dice"]["mean"], found["summaries"][name]["pooled_lesion_f1"])
        for name in ("all cases", large_name)
    )
    missed = [row["truth_ml"] for row in found["cases"].values() if row["dice"] == 0]
    none = (
        f" Nothing of the lesions was found in {len(missed)} of them, of up to {max(missed):.1f} mL." if missed else ""
    )
    yield (
        f"On {len(found['cases'])} held-out subjects of {title} ({found['date']}): mean Dice {dice:.3f}, {large:.3f} "
        f"with {large_name} of lesion, pooled lesion-wise F1 {f1:.3f}.{none}"
    )
    if healthy := found.get("healthy"):
        yield (
            f"In {len(healthy['cases_ml'])} healthy synthetic heads {healthy['mean_ml']:.2f} mL were falsely marked on "
            f"average, in the head they are drawn from {healthy['template_ml']:.2f} mL."
        )


def committed_results() -> dict[str, Any]:
    """By kind of subjects, as ``make held-out`` writes them."""
    files = {kind: RESULTS / f"held_out{'' if kind == 'old' else f'_{kind}'}.json" for kind in KINDS}
    return {kind: json.loads(file.read_text()) for kind, file in files.items() if file.exists()}


def write_card() -> Path:
    """The card of the bundle in the package."""
    folder = PACKAGED / "demo"
    path = folder / "README.md"
    path.write_text(card(load_bundle(folder), committed_results()))
    return path


def averaged(trained: Bundle, packaged: Bundle, share: float) -> Bundle:
    """The trained bundle with ``share`` of its weights and the rest of those that it was trained from.

    Raises:
        ValueError: it was trained from others.
    """
    start, before = trained.card["started_from"], packaged.weights_sha256
    if start != before:
        raise ValueError(f"bundle: expected one that was trained from the packaged weights, {before}, found {start}")
    old, network = packaged.network.state_dict(), copy.deepcopy(trained.network)
    network.load_state_dict({name: torch.lerp(old[name], new, share) for name, new in network.state_dict().items()})
    history = [*trained.card["history"], f"averaged with the weights before by `--average {share:g}`"]
    return replace(trained, network=network, card={**trained.card, "history": history})


def ship(trained: Path, share: float = 1.0) -> Path:
    """Calibrate and store; returns the folder in the package."""
    bundle = load_bundle(trained)
    if share != 1:
        bundle = averaged(bundle, load_bundle("demo"), share)
    bundle = replace(bundle, tta_flip=True, tta_scales=(1.0, 1.1))
    return save_bundle(calibrated(bundle), PACKAGED / "demo", dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="folder of the trained bundle")
    parser.add_argument(
        "--average", type=float, default=1.0, metavar="SHARE", help="of the trained weights (default: 1)"
    )
    parser.add_argument("--card", action="store_true", help="write the card alone")
    options = parser.parse_args()
    if options.card == (options.bundle is not None):
        parser.error("expected a bundle's folder, or --card")
    if options.bundle is not None:
        folder = ship(options.bundle, options.average)
        write_card()
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 2**20:.1f} MiB")
    else:
        print(write_card())


if __name__ == "__main__":
    main()
