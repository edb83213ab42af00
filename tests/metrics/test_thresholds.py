"""The rule that picks a threshold, against a loop over all candidates."""

import random

import pytest

from vessel.metrics.thresholds import THRESHOLDS, best_index


def best_by_a_loop(thresholds, dice):
    best = 0
    for i in range(1, len(thresholds)):
        higher = dice[i] > dice[best]
        nearer = dice[i] == dice[best] and abs(thresholds[i] - 0.5) < abs(thresholds[best] - 0.5)
        if higher or nearer:
            best = i
    return best


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_the_rule_is_that_of_a_naive_loop(levels):
    """Few levels of Dice give many ties."""
    random.seed(levels)
    for _ in range(200):
        dice = [random.randrange(levels) / levels for _ in THRESHOLDS]
        assert best_index(THRESHOLDS, dice) == best_by_a_loop(THRESHOLDS, dice)


@pytest.mark.parametrize(
    ("thresholds", "dice", "expected"),
    [
        ([0.2, 0.4, 0.55, 0.9], [0.8, 0.8, 0.8, 0.1], 2),  # nearest 0.5 of three
        ([0.2, 0.4, 0.55, 0.9], [0.8, 0.8, 0.8, 0.9], 3),  # the highest, far from 0.5
        ([0.25, 0.75], [0.6, 0.6], 0),  # as near: the first
        ([0.75, 0.25], [0.6, 0.6], 0),
    ],
)
def test_ties(thresholds, dice, expected):
    assert best_index(thresholds, dice) == expected
