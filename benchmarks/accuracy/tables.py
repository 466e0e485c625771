"""Tables from the results of runs alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.accuracy.times import MAPS
from benchmarks.accuracy.variants import SETTINGS, VARIANTS

__all__ = ["Difference", "Results", "difference", "page", "tests_of"]

RESAMPLES = 10_000
HOW = (
    "Dice of a seed is the mean over the test subjects; the number in brackets is the mean of the seeds' medians. A "
    "difference is paired: the same subjects, the same seeds. Its 95 % interval is a bootstrap over subjects and over "
    "seeds, both drawn anew in each of 10,000 resamples (percentiles): it says what other subjects and other seeds "
    "would change. Of so few seeds it is still too narrow; the column behind it shows them. Seconds are those of the "
    "processor, one thread, medians of rounds in which each variant has its turn: a step of 8 crops, a volume of 24 "
    "slices with its residual maps where the variant needs them."
)
DICE_HEAD = (
    "| variant | what it is | seeds | mean Dice (median) | SD of seeds | parameters, millions | s a step "
    "| s a volume |\n|---|---|---|---|---|---|---|---|"
)
DIFFERENCE_HEAD = (
    "| variant | less its control | difference | 95 % interval | is | seed by seed |\n|---|---|---|---|---|---|"
)


class Results:
    """Results of runs by setting, variant and seed.

    Args:
        runs: as :func:`benchmarks.accuracy.train.run` returns them.
        times: as :func:`benchmarks.accuracy.times.measure` returns them, or none.
    """

    def __init__(self, runs: Sequence[dict[str, Any]], times: Mapping[str, Mapping[str, float]]) -> None:
        self.runs = {(one["setting"], one["variant"], one["seed"]): one for one in runs}
        self.times = times

    def seeds(self, setting: str, variant: str, test: str) -> list[int]:
        return sorted(
            seed for (where, name, seed), one in self.runs.items() if (where, name) == (setting, variant)
            and test in one["dice"]
        )  # fmt: skip

    def dice(self, setting: str, variant: str, test: str, seeds: Sequence[int]) -> np.ndarray:
        """(seeds, subjects) float64."""
        return np.array([self.runs[setting, variant, seed]["dice"][test] for seed in seeds])

    def parameters(self, variant: str) -> int:
        return next(one["parameters"] for (_, name, _), one in self.runs.items() if name == variant)

    def seconds(self, variant: str, what: str) -> float | None:
        """``"a step"`` or ``"a volume"``, that with the residual maps that the variant needs; None: not measured."""
        own = self.times.get(variant)
        if own is None:
            return None
        with_maps = what == "a volume" and VARIANTS[variant].residual
        return own[what] + (self.times[MAPS][what] if with_maps else 0)


class Difference(NamedTuple):
    """Of a variant's Dice to its control's.

    Attributes:
        mean: over subjects and seeds.
        low: end of the 95 % interval.
        high: its other end.
        by_seed: mean over the subjects, for each seed that both have.
    """

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]


def difference(of: np.ndarray, control: np.ndarray) -> Difference:
    """The paired difference of two arrays (seeds, subjects) of the same seeds and subjects."""
    paired = of - control
    rng = np.random.default_rng(0)
    # How often each seed and each subject is drawn, as shares.
    seeds, subjects = (rng.multinomial(count, [1 / count] * count, RESAMPLES) / count for count in paired.shape)
    low, high = np.quantile(((seeds @ paired) * subjects).sum(1), [0.025, 0.975])
    return Difference(float(paired.mean()), float(low), float(high), tuple(paired.mean(1).tolist()))


def tests_of(results: Results) -> list[str]:
    """The test sets that runs have figures of."""
    return list(dict.fromkeys(test for one in results.runs.values() for test in one["dice"]))


def _dice_rows(results: Results, setting: str, test: str) -> Iterator[str]:
    for name, variant in VARIANTS.items():
        seeds = results.seeds(setting, name, test)
        if not seeds:
            continue
        values = results.dice(setting, name, test, seeds)
        figures = (
            f"{values.mean():.3f} ({np.median(values, 1).mean():.3f})",
            f"{np.std(values.mean(1), ddof=1):.3f}" if len(seeds) > 1 else "",
            f"{results.parameters(name) / 1e6:.2f}",
            *(f"{found:.2f}" if (found := results.seconds(name, what)) is not None else ""
              for what in ("a step", "a volume")),
        )  # fmt: skip
        yield f"| {name} | {variant.about} | {len(seeds)} | {' | '.join(figures)} |"


def _difference_rows(results: Results, setting: str, test: str) -> Iterator[str]:
    for name, variant in VARIANTS.items():
        for control in variant.controls:
            own, other = (results.seeds(setting, one, test) for one in (name, control))
            shared = [seed for seed in own if seed in other]
            if not shared:
                continue
            found = difference(*(results.dice(setting, one, test, shared) for one in (name, control)))
            side = "ahead" if found.low > 0 else "behind" if found.high < 0 else ""
            interval = f"{found.low:+.3f} to {found.high:+.3f}"
            by_seed = ", ".join(f"{value:+.3f}" for value in found.by_seed)
            yield f"| {name} | {control} | {found.mean:+.3f} | {interval} | {side} | {by_seed} |"


def page(results: Results) -> str:
    """All tables, in Markdown."""
    lines = [HOW]
    for setting in SETTINGS:
        for test in tests_of(results):
            rows = list(_dice_rows(results, setting, test))
            if not rows:
                continue
            first = next(one for (where, _, _), one in results.runs.items() if where == setting and test in one["dice"])
            about = (
                f"{first['subjects']} subjects to train on, {first['steps']} steps, "
                f"{len(first['dice'][test])} subjects to test on."
            )
            lines += ["", f"## {setting.capitalize()}, test subjects: {test}", "", about, "", DICE_HEAD, *rows]
            rows = list(_difference_rows(results, setting, test))
            lines += ["", DIFFERENCE_HEAD, *rows] if rows else []
    return "\n".join(lines)
