"""Choose the probability threshold: one list of candidates and one rule."""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))


def best_index(thresholds: Sequence[float], dice: Sequence[float]) -> int:
    """Return the index of the threshold with the highest Dice; of equals, the one nearest 0.5, then the first.

    Args:
        thresholds: T candidates in [0, 1].
        dice: T values, the mean Dice over images at each of them.
    """
    return max(range(len(thresholds)), key=lambda i: (dice[i], -abs(thresholds[i] - 0.5)))
