"""Calibrate a trained bundle and store it in the package as ``demo``, in half precision; ends ``make weights``.

Of several bundles, each trained from the weights before, the mean of the weights is stored; ``--shares`` says how much
of each. ``--card`` writes the bundle's card alone, with the figures of the last ``make held-out``.
"""

from __future__ import annotations

import argparse
import copy
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
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


def averaged(bundles: Sequence[Bundle], shares: Sequence[float]) -> Bundle:
    """The bundle with the longest history, with the mean of the weights of the networks.

    Args:
        bundles: of one chain of trainings; at least one.
        shares: of each, as many, in any unit.

    Raises:
        ValueError: bundles whose history does not begin the longest one.
    """
    histories = [list(bundle.card["history"]) for bundle in bundles]
    last = max(bundles, key=lambda bundle: len(bundle.card["history"]))
    longest = list(last.card["history"])
    if other := next((own for own in histories if own != longest[: len(own)]), None):
        raise ValueError(f"bundles: expected trainings of one chain, found one after {other} beside {longest}")
    states = [bundle.network.state_dict() for bundle in bundles]
    parts = [share / sum(shares) for share in shares]
    network = copy.deepcopy(last.network)
    network.load_state_dict(
        {
            name: torch.stack([part * state[name] for part, state in zip(parts, states, strict=True)]).sum(0)
            for name in network.state_dict()
        }
    )
    numbers = " and ".join(str(len(own)) for own in histories)
    mean = f"the mean of the weights after number {numbers} of this list, {' : '.join(f'{one:g}' for one in shares)}"
    return replace(last, network=network, card={**last.card, "history": [*longest, mean]})


def ship(trained: Sequence[str], shares: Sequence[float] | None = None) -> Path:
    """Calibrate and store, of several the mean; returns the folder in the package.

    Args:
        trained: names or folders of bundles.
        shares: of each; None: alike.
    """
    bundles = [load_bundle(name) for name in trained]
    bundle = averaged(bundles, shares or [1.0] * len(bundles)) if len(bundles) > 1 else bundles[0]
    bundle = replace(bundle, tta_flip=True, tta_scales=(1.0, 1.1))
    return save_bundle(calibrated(bundle), PACKAGED / "demo", dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE", help="name or folder of a trained bundle")
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="N", help="of each bundle in the mean (default: alike)"
    )
    parser.add_argument("--card", action="store_true", help="write the card alone")
    options = parser.parse_args()
    if options.card == bool(options.bundles) or (options.shares and len(options.shares) != len(options.bundles)):
        parser.error("expected bundles, with as many shares or none, or --card")
    if options.bundles:
        folder = ship(options.bundles, options.shares)
        write_card()
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 2**20:.1f} MiB")
    else:
        print(write_card())


if __name__ == "__main__":
    main()
