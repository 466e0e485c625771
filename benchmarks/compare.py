"""Two result files, contestant by contestant: ``python -m benchmarks.compare A.json B.json``.

The ratio of B to A is relative to the group's other contestants that are not ours (to ours where there are none),
paired by round, so that a machine that is slower on the day hits both sides; the median over these counts, so that of
three or more the bad day of one does not. The ratio of absolute times stands beside it. The noise band comes from what
the processes of each run differ by, row by row, which includes where memory and code happened to lie in each. Only
outside the band is a contestant called slower or faster, and never where it has no others. Exit status 1: one of ours
is slower; 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import optimize, special, stats

from benchmarks.records import Record, Run, load

__all__ = ["OTHERS", "OURS", "Comparison", "Prior", "band_of", "compare", "different_places", "main"]


@dataclass(frozen=True)
class Prior:
    """What the rows of a machine's runs have in common; six processes alone know little about their own noise.

    The variance of a row's logarithm between processes is taken to be ``variance`` times ``freedom`` over a chi-squared
    variable of that many degrees of freedom (G. K. Smyth, Statistical Applications in Genetics and Molecular Biology
    3(1), 2004, which also says how to find both).
    """

    variance: float
    freedom: float


# Of our contestants and of the others, which take more fresh memory. Measured by `make bench` on an idle machine
# (2 cores) and `python -m benchmarks.compare --measure A.json B.json`, which prints both.
OURS, OTHERS = Prior(0.049**2, 5.0), Prior(0.040**2, 2.7)
# Of comparisons of identical code, this share reports anything.
REPORTED = 0.05


@dataclass(frozen=True)
class Comparison:
    """B over A for one contestant.

    Attributes:
        group, name, ours: of the contestant.
        paired: whether there are other contestants to compare with.
        relative: ratio of the times relative to theirs, or of absolute times where there are none.
        absolute: ratio of the times.
        variance, freedom: of the logarithm of the relative time of a process, and its degrees of freedom, 0 where each
            run is of one process.
        band: factor, 1 or more; identical code stays between 1 / band and band.
    """

    group: str
    name: str
    ours: bool
    paired: bool
    relative: float
    absolute: float
    variance: float
    freedom: int
    band: float

    @property
    def verdict(self) -> str:
        if not self.paired:
            return ""
        if self.relative > self.band:
            return "slower"
        return "faster" if self.relative < 1 / self.band else ""


def _logarithms(records: Sequence[Record]) -> list[np.ndarray]:
    """By process, (contestants, rounds), of the rounds that all have."""
    every = []
    for processes in zip(*(one.processes for one in records), strict=True):
        count = min(len(rounds) for rounds in processes)
        every.append(np.log([rounds[:count] for rounds in processes]))
    return every


def relative_times(own: int, others: Sequence[int], runs: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """By run, the logarithm of one contestant's time relative to others in each process; zero on the whole.

    Of each other one, the median over rounds of the ratio to it, less the mean over the runs; of these, the median, so
    that one whose memory happens to lie badly in a process does not count. Without others, its own time.
    """

    def ratios(process: np.ndarray) -> np.ndarray:
        return np.median(process[own] - process[others] if others else process[[own]], axis=1)

    found = [np.array([ratios(process) for process in run]) for run in runs]  # (processes, others) each
    middle = np.mean([one.mean(axis=0) for one in found], axis=0)
    return [np.median(one - middle, axis=1) for one in found]


def band_of(variance: float, freedom: int, counts: Sequence[int], prior: Prior, share: float) -> float:
    """Factor outside of which this share of comparisons of identical code lies; ``counts`` are processes a run."""
    own = freedom / (prior.freedom + freedom)
    moderated = own * variance + (1 - own) * prior.variance
    factor = float(stats.t.ppf(1 - share / 2, prior.freedom + freedom))
    return math.exp(factor * math.sqrt(moderated * sum(1 / count for count in counts)))


def compare(a: Run, b: Run, priors: tuple[Prior, Prior] = (OURS, OTHERS)) -> tuple[list[Comparison], list[str]]:
    """Every contestant that both have, and the names of those that only one has; ``priors`` of ours and the others."""
    groups: dict[str, list[str]] = {}
    missing = []
    for group in dict.fromkeys([*a.groups, *b.groups]):
        sides = a.groups.get(group, {}), b.groups.get(group, {})
        groups[group] = [name for name in sides[0] if name in sides[1]]
        missing += [f"only in A: {group}, {name}" for name in sides[0] if name not in sides[1]]
        missing += [f"only in B: {group}, {name}" for name in sides[1] if name not in sides[0]]
    rows = sum(map(len, groups.values()))
    found = []
    for group, names in groups.items():
        runs = [_logarithms([run.groups[group][name] for name in names]) for run in (a, b)] if names else []
        ours_of = [bool(b.groups[group][name].info["ours"]) for name in names]
        for row, (name, ours) in enumerate(zip(names, ours_of, strict=True)):
            others = [other for other in range(len(names)) if other != row]
            others = [other for other in others if not ours_of[other]] or others
            times = relative_times(row, others, runs)
            counts = [len(one) for one in times]
            freedom = sum(counts) - 2
            spread = sum(float(np.sum((one - one.mean()) ** 2)) for one in times)
            variance = spread / freedom if freedom else 0.0
            prior = priors[0 if ours else 1]
            found.append(
                Comparison(
                    group,
                    name,
                    ours,
                    paired=len(names) > 1,
                    relative=math.exp(times[1].mean() - times[0].mean()),
                    absolute=b.groups[group][name].median / a.groups[group][name].median,
                    variance=variance,
                    freedom=freedom,
                    band=band_of(variance, freedom, counts, prior, REPORTED / rows),
                )
            )
    return found, missing


def prior_of(found: Sequence[Comparison]) -> Prior:
    """The constants, from rows with several processes a run, by the moments of the logarithms of their variances."""
    known = [one for one in found if one.paired and one.freedom and one.variance]
    if len(known) < 3:
        raise ValueError(f"expected 3 contestants or more of several processes, got {len(known)}")
    half = np.array([one.freedom / 2 for one in known])
    logs = np.log([one.variance for one in known]) - special.digamma(half) + np.log(half)
    beyond = float(np.var(logs, ddof=1) - np.mean(special.polygamma(1, half)))
    if beyond <= 0:  # the rows do not differ: all have the same variance
        return Prior(math.exp(float(np.mean(logs))), math.inf)
    other = optimize.brentq(lambda value: float(special.polygamma(1, value)) - beyond, 1e-6, 1e12)
    return Prior(math.exp(float(np.mean(logs) + special.digamma(other) - np.log(other))), 2 * other)


def different_places(a: Run, b: Run) -> list[str]:
    """What of the machines and the runs forbids a comparison of times."""
    sides = [{**run.machine, "quick": run.quick} for run in (a, b)]
    return [
        f"{key}: {sides[0].get(key)!r} and {sides[1].get(key)!r}"
        for key in ("cpu", "cores", "threads", "device", "quick")
        if sides[0].get(key) != sides[1].get(key)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return _program(arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def _program(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--force", action="store_true", help="whatever the machines and threads are")
    parser.add_argument("--measure", action="store_true", help="print what processes of identical code differ by")
    options = parser.parse_args(arguments)
    a, b = load(options.a), load(options.b)
    different = different_places(a, b)
    if different and not options.force:
        print(
            f"expected runs of one kind on one machine with the same threads, got {'; '.join(different)}",
            file=sys.stderr,
        )
        return 2
    found, missing = compare(a, b)
    if options.measure:
        for name, ours in (("ours", True), ("others", False)):
            prior = prior_of([one for one in found if one.ours == ours])
            print(f"{name}: standard deviation {prior.variance**0.5:.4f}, degrees of freedom {prior.freedom:.1f}")
        return 0
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
