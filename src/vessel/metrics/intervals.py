"""The interval of a mean over few clusters: a smoothed, studentised bootstrap that draws whole clusters.

`python -m bench.coverage` chose it: 1,000 simulated sets of 7 patients for each of six populations, nine methods. Share
of 95 % intervals that hold the true mean, and what the percentile bootstrap has there:

    Dice, symmetric 0.952 (percentile 0.878)            Dice, skewed 0.899 (0.789)
    Dice, half of the patients exactly 1 0.965 (0.853)  Dice, one patient in seven fails 0.696 (0.665)
    HD95, log-normal 0.925 (0.821)                      paired difference, heavy tails 0.949 (0.866)

The plain studentised bootstrap is as near to 0.95, but up to half again as wide, and without an end where patients tie.
BCa is hardly better than percentiles. Where one patient in seven fails, a third of the sets hold no such patient, and
no method can know of them. Of 3 patients the six lie between 0.66 and 0.96, of 15 between 0.89 and 0.98, of 32 between
0.93 and 0.98.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

Interval = tuple[float, float] | tuple[None, None]


def cluster_interval(
    values: ArrayLike,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Compute the interval of the mean over clusters, each with one value: its own mean, or a paired difference.

    Clusters are drawn with replacement, each with normal noise of variance s^2 / n added, and t = (mean of the draw -
    mean) / standard error of the draw; the interval is mean - t s / sqrt(n) between the quantiles of t (the bootstrap-t
    of Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5). The noise gives a draw the unbiased
    variance (Hesterberg, Unbiasing the bootstrap, 2004) and keeps t finite where clusters have equal values: with two
    or three clusters the interval is nearly that of Student's t. Skewness still shows: the interval is not symmetric.

    Args:
        values: float [n], one of each cluster, finite; their order does not matter.
        level: share of intervals that should hold the true mean, in (0, 1).
        draws: bootstrap draws.
        seed: of the draws.
        bounds: the least and the greatest value a mean can have; the interval is cut there.

    Returns:
        Both ends; the mean twice where all values are equal, None twice for fewer than two clusters.

    Raises:
        ValueError: values are not a finite vector, or the level is not between 0 and 1.
    """
    given = np.sort(np.asarray(values, dtype=np.float64))  # sorted: equal data in another order gets equal draws
    if given.ndim != 1 or not np.isfinite(given).all() or not 0 < level < 1:
        raise ValueError(f"values of shape {given.shape} have to be a finite vector, level {level} in (0, 1)")
    n = len(given)
    if n < 2:
        return None, None
    if given[-1] - given[0] <= 1e-12 * np.abs(given).max():  # equal but for the rounding of the means
        middle = float(np.median(given))
        return middle, middle
    mean, spread = given.mean(), given.std(ddof=1)
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((draws, n)) * spread / np.sqrt(n)
    drawn = given[generator.integers(n, size=(draws, n))] + noise
    t = (drawn.mean(1) - mean) / drawn.std(1, ddof=1)  # sqrt(n) of both standard errors cancels
    least, greatest = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    low, high = np.clip(mean - np.array([greatest, least]) * spread, bounds[0], bounds[1]).tolist()
    return low, high
