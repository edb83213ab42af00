"""python -m bench.coverage: count how often intervals of a mean over few patients hold the true mean, by method.

Simulates sets of patients of 1 to 4 videos of 20 to 40 frames that look alike, from populations of six shapes, and
counts. `python -m bench.coverage 4 500` takes another number of patients (7) and of sets (1000). A minute and a half
on one core; the same figures at every run. Writes outputs/bench/coverage.json and a table for each shape.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats
from scipy.special import expit, logit

from vessel.metrics.intervals import cluster_interval

OUT = Path("outputs/bench")
LEVEL, DRAWS = 0.95, 2000
Vector = NDArray[np.float64]
Ends = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """A population of patients.

    Attributes:
        effects: draws n effects of patients, on the scale of `score`'s argument.
        score: from effects of patient + video + frame to a score.
        link: from a score to a scale without ends, with the slope there, and back.
        bounds: of a mean of scores.
        video, frame: standard deviation of their effects; a frame's is small, neighbours are near duplicates.
    """

    effects: Callable[[Generator, int], Vector]
    score: Callable[[Vector], Vector]
    link: tuple[Callable[[Vector], Vector], Callable[[Vector], Vector], Callable[[Vector], Vector]]
    bounds: Ends = (0.0, 1.0)
    video: float = 0.3
    frame: float = 0.15

    def true_mean(self, generator: Generator, draws: int = 4_000_000) -> float:
        """Compute the mean of the population: that of one frame of one video of any patient."""
        rest = generator.normal(0, self.video, draws) + generator.normal(0, self.frame, draws)
        return float(self.score(self.effects(generator, draws) + rest).mean())

    def patients(self, generator: Generator, n: int) -> Vector:
        """Draw means of n patients over their videos, each a mean over its frames."""
        return np.array([self._patient(generator, effect) for effect in self.effects(generator, n)])

    def _patient(self, generator: Generator, effect: float) -> float:
        videos = effect + generator.normal(0, self.video, generator.integers(1, 5))
        frames = (video + generator.normal(0, self.frame, generator.integers(20, 41)) for video in videos)
        return float(np.mean([self.score(each).mean() for each in frames]))


def _same(x: Vector) -> Vector:
    return x


LOGIT = (logit, lambda x: 1 / (x * (1 - x)), expit)
LOG = (np.log, lambda x: 1 / x, np.exp)
NONE = (_same, np.ones_like, _same)
SHAPES = {
    "Dice, symmetric": Shape(lambda g, n: g.normal(0.4, 0.5, n), expit, LOGIT),
    "Dice, skewed": Shape(lambda g, n: 2.4 - g.gamma(1, 0.9, n), expit, LOGIT),
    "Dice, half exactly 1": Shape(lambda g, n: np.where(g.random(n) < 0.5, 50, g.normal(1.2, 0.8, n)), expit, LOGIT),
    "Dice, one patient in seven fails": Shape(
        lambda g, n: g.normal(2, 0.3, n) - 3.5 * (g.random(n) < 1 / 7), expit, LOGIT
    ),
    "HD95, log-normal": Shape(lambda g, n: g.normal(1.5, 0.7, n), np.exp, LOG, bounds=(0.0, math.inf)),
    "paired difference, heavy tails": Shape(
        lambda g, n: 0.02 + 0.03 * g.standard_t(3, n), _same, NONE, bounds=(-1.0, 1.0), video=0.02, frame=0.03
    ),
}  # fmt: skip


def student(values: Vector, shape: Shape, _: int) -> Ends:
    mean, error = _moments(values)
    reach = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error
    return mean - reach, mean + reach


def student_linked(values: Vector, shape: Shape, _: int) -> Ends:
    mean, error = _moments(values)
    to, slope, back = shape.link
    reach = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error * slope(mean)
    return back(to(mean) - reach), back(to(mean) + reach)


def of_scipy(method: str) -> Callable[[Vector, Shape, int], Ends]:
    """Return the interval of a method of `scipy.stats.bootstrap`."""

    def ends(values: Vector, shape: Shape, seed: int) -> Ends:
        found = stats.bootstrap((values,), np.mean, confidence_level=LEVEL, n_resamples=DRAWS, method=method, rng=seed)
        return found.confidence_interval.low, found.confidence_interval.high

    return ends


def expanded(values: Vector, _: Shape, seed: int) -> Ends:
    """Take percentiles further out, as Student's t is further out than the normal (Hesterberg 2015, section 5.3)."""
    n = len(values)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + LEVEL) / 2, n - 1))
    low, high = np.quantile(_drawn(values, seed).mean(1), [tail, 1 - tail])
    return float(low), float(high)


def studentised(values: Vector, _: Shape, seed: int) -> Ends:
    return _studentised(values, NONE, seed)


def studentised_linked(values: Vector, shape: Shape, seed: int) -> Ends:
    return _studentised(values, shape.link, seed)


def smoothed(values: Vector, _: Shape, seed: int) -> Ends:
    low, high = cluster_interval(values, level=LEVEL, draws=DRAWS, seed=seed)
    assert low is not None
    assert high is not None
    return low, high


METHODS: dict[str, Callable[[Vector, Shape, int], Ends]] = {
    "percentile": of_scipy("percentile"),
    "basic": of_scipy("basic"),
    "BCa": of_scipy("BCa"),
    "percentile, expanded": expanded,
    "studentised": studentised,
    "studentised on the logit or log": studentised_linked,
    "studentised, smoothed (vessel)": smoothed,
    "Student's t": student,
    "Student's t on the logit or log": student_linked,
}


def main(patients: str = "7", sets: str = "1000") -> None:
    """Simulate, print and write."""
    found = {name: dict(measure(shape, int(patients), int(sets))) for name, shape in SHAPES.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "coverage.json").write_text(
        json.dumps({"patients": int(patients), "sets": int(sets), "level": LEVEL, "shapes": found}, indent=1) + "\n"
    )
    console = Console()
    for name, methods in found.items():
        table = Table("method", title=f"{name}: {patients} patients, {sets} sets")
        for column in ("coverage", "mean width", "outside the range"):
            table.add_column(column, justify="right")
        for method, result in methods.items():
            table.add_row(method, f"{result['coverage']:.3f}", f"{result['width']:.3f}", f"{result['outside']:.3f}")
        console.print(table)
    table = Table("method", title=f"distance of the coverage from {LEVEL}, mean over the shapes")
    table.add_column("", justify="right")
    for method in METHODS:
        distance = np.mean([abs(methods[method]["coverage"] - LEVEL) for methods in found.values()])
        table.add_row(method, f"{distance:.3f}")
    console.print(table)
    print(f"bench: {OUT / 'coverage.json'}")


def measure(shape: Shape, patients: int, sets: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Measure coverage, mean width after the ends are clipped to the range, and the fraction of intervals clipped.

    Args:
        shape: of the population.
        patients: of a set.
        sets: how many.
    """
    generator = np.random.default_rng(0)
    true_mean = shape.true_mean(generator)
    samples = [shape.patients(generator, patients) for _ in range(sets)]
    low, high = shape.bounds
    for name, method in METHODS.items():
        ends = np.array([_ends(method, values, shape, seed) for seed, values in enumerate(samples)])
        clipped = ends.clip(low, high)
        yield (
            name,
            {
                "coverage": float(((clipped[:, 0] <= true_mean) & (true_mean <= clipped[:, 1])).mean()),
                "width": float((clipped[:, 1] - clipped[:, 0]).mean()),
                "outside": float(((ends[:, 0] < low) | (ends[:, 1] > high)).mean()),
            },
        )


def _ends(method: Callable[[Vector, Shape, int], Ends], values: Vector, shape: Shape, seed: int) -> Ends:
    return (values[0], values[0]) if np.ptp(values) == 0 else method(values, shape, seed)


def _studentised(values: Vector, link: tuple[Callable[[Vector], Vector], ...], seed: int) -> Ends:
    """Compute the bootstrap-t interval on the scale of a link, the standard error by the delta method."""
    to, slope, back = link
    mean, error = _moments(values)
    drawn = _drawn(values, seed)
    means, errors = drawn.mean(1), drawn.std(1, ddof=1) / math.sqrt(len(values))
    equal = errors < 1e-9 * error  # a draw of one value alone: t has no end
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(equal, np.copysign(math.inf, means - mean), (to(means) - to(mean)) / (errors * slope(means)))
    least, greatest = np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    reach = error * slope(mean)
    return back(to(mean) - greatest * reach), back(to(mean) - least * reach)


def _drawn(values: Vector, seed: int) -> Vector:
    return values[np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))]


def _moments(values: Vector) -> tuple[Vector, Vector]:
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


if __name__ == "__main__":
    main(*sys.argv[1:])
