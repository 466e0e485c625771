"""Two result files, contestant by contestant: ``python -m benchmarks.compare A.json B.json``.

The ratio of B to A is relative to the group's other contestants, paired by round, so that a machine that is slower on
the day hits both sides; the median over these counts, so that one other contestant's bad day does not. The ratio of
absolute times stands beside it. The noise band comes from the rounds
of both files (bootstrap of the median) and from what two runs of identical code differ by all the same. Only outside
the band is a contestant called slower or faster. Exit status 1: one of ours is slower; 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.records import Record, Run, load

__all__ = ["OTHERS_BETWEEN_RUNS", "OURS_BETWEEN_RUNS", "Comparison", "band_of", "compare", "different_places", "main"]

# Standard deviation of the logarithm of B / A for two runs of identical code on an idle machine, beyond what their
# rounds show: the placement of memory and code, for example, stays the same within a run. Of our contestants and of the
# others, which take more fresh memory. Measured by `make bench` twice on an idle machine (2 cores) and
# `python -m benchmarks.compare --measure A.json B.json`, which prints both.
OURS_BETWEEN_RUNS, OTHERS_BETWEEN_RUNS = 0.057, 0.076
# Of comparisons of identical code, this share lies outside the band.
OUTSIDE = 0.001
DRAWS = 200


@dataclass(frozen=True)
class Comparison:
    """B over A for one contestant.

    Attributes:
        group, name, ours: of the contestant.
        paired: whether there are other contestants to compare with.
        relative: ratio of the times relative to theirs, or of absolute times where there are none.
        absolute: ratio of the times.
        band: factor, 1 or more; identical code stays between 1 / band and band.
        variance: of the logarithm of ``relative``, by the rounds alone.
    """

    group: str
    name: str
    ours: bool
    paired: bool
    relative: float
    absolute: float
    band: float
    variance: float

    @property
    def verdict(self) -> str:
        if self.relative > self.band:
            return "slower"
        return "faster" if self.relative < 1 / self.band else ""


def _logarithms(records: Sequence[Record]) -> np.ndarray:
    """(contestants, rounds), of the rounds that all have."""
    count = min(len(one.seconds) for one in records)
    return np.log([one.seconds[:count] for one in records])


def ratio_of(own: int, a: np.ndarray, b: np.ndarray) -> float:
    """Logarithm of B over A of one contestant, relative to the others.

    Of each other one, the median over rounds of the ratio to it; of these, the median, so that a contestant whose
    memory happens to lie badly in one run counts once.
    """
    others = [row for row in range(len(a)) if row != own]
    if not others:
        return float(np.median(b) - np.median(a))
    return float(np.median(np.median(b[own] - b[others], axis=1) - np.median(a[own] - a[others], axis=1)))


def variances_of(own: int, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Of that ratio, from the rounds of A and from those of B, by bootstrap with a fixed seed."""
    generator = np.random.default_rng(0)

    def drawn(values: np.ndarray) -> np.ndarray:
        return values[:, generator.integers(values.shape[1], size=values.shape[1])]

    return (
        float(np.var([ratio_of(own, drawn(a), b) for _ in range(DRAWS)])),
        float(np.var([ratio_of(own, a, drawn(b)) for _ in range(DRAWS)])),
    )


def band_of(variances: Sequence[float], rounds: Sequence[int], between_runs: float) -> float:
    """Factor within which two runs of identical code differ."""
    variance = sum(variances) + between_runs**2
    # Few rounds know little about their own noise (Welch and Satterthwaite); what runs differ by is known well.
    unsure = sum(one**2 / max(1, count - 1) for one, count in zip(variances, rounds, strict=True))
    freedom = variance**2 / unsure if unsure else math.inf
    return math.exp(float(stats.t.ppf(1 - OUTSIDE / 2, freedom)) * math.sqrt(variance))


def compare(
    a: Run, b: Run, between_runs: tuple[float, float] = (OURS_BETWEEN_RUNS, OTHERS_BETWEEN_RUNS)
) -> tuple[list[Comparison], list[str]]:
    """Every contestant that both have, and the names of those that only one has."""
    found, missing = [], []
    for group in dict.fromkeys([*a.groups, *b.groups]):
        sides = a.groups.get(group, {}), b.groups.get(group, {})
        names = [name for name in sides[0] if name in sides[1]]
        missing += [f"only in A: {group}, {name}" for name in sides[0] if name not in sides[1]]
        missing += [f"only in B: {group}, {name}" for name in sides[1] if name not in sides[0]]
        if not names:
            continue
        times = [_logarithms([side[name] for name in names]) for side in sides]
        for row, name in enumerate(names):
            ours = bool(sides[1][name].info["ours"])
            variances = variances_of(row, *times)
            found.append(
                Comparison(
                    group,
                    name,
                    ours,
                    paired=len(names) > 1,
                    relative=math.exp(ratio_of(row, *times)),
                    absolute=sides[1][name].median / sides[0][name].median,
                    band=band_of(variances, [one.shape[1] for one in times], between_runs[0 if ours else 1]),
                    variance=sum(variances),
                )
            )
    return found, missing


def different_places(a: Run, b: Run) -> list[str]:
    """What of the machines forbids a comparison of times."""
    return [
        f"{key}: {a.machine.get(key)!r} and {b.machine.get(key)!r}"
        for key in ("cpu", "cores", "threads", "device")
        if a.machine.get(key) != b.machine.get(key)
    ]


def between_runs(a: Run, b: Run) -> tuple[float, float]:
    """What the constants are measured by: the spread of identical code's ratios beyond that of the rounds."""
    found, _ = compare(a, b, (0.0, 0.0))

    def of(ratios: list[Comparison]) -> float:
        spread = sum(math.log(one.relative) ** 2 for one in ratios)
        explained = sum(one.variance for one in ratios)
        return math.sqrt(max(0.0, spread - explained) / max(1, len(ratios)))

    return of([one for one in found if one.paired and one.ours]), of(
        [one for one in found if one.paired and not one.ours]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--force", action="store_true", help="whatever the machines and threads are")
    parser.add_argument("--measure", action="store_true", help="print what two runs of identical code differ by")
    options = parser.parse_args(arguments)
    a, b = load(options.a), load(options.b)
    different = different_places(a, b)
    if different and not options.force:
        print(f"expected runs on one machine with the same threads, got {'; '.join(different)}", file=sys.stderr)
        return 2
    if options.measure:
        print("between runs: {:.4f} (ours), {:.4f} (others)".format(*between_runs(a, b)))
        return 0
    found, missing = compare(a, b)
    if not found:
        print("expected contestants that both files have, found none", file=sys.stderr)
        return 2
    print(f"{'B / A, relative to the others':>34}{'band':>18}{'absolute':>10}")
    group = None
    for one in found:
        if one.group != group:
            group = one.group
            print(group)
        band = f"{1 / one.band:.3f} to {one.band:.3f}"
        print(f"  {one.name[:26]:<26}{one.relative:>6.3f}{band:>18}{one.absolute:>10.3f}  {one.verdict}")
    for line in missing:
        print(line)
    slower = [one for one in found if one.ours and one.verdict == "slower"]
    outside = sum(bool(one.verdict) for one in found)
    print(f"{len(found)} compared, {outside} outside their band, {len(slower)} of ours slower")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
