"""The threshold table that the predecessor published, reproduced in shape.

It was made on twenty frames of one patient. The frames here are built so that their mean precision and recall are those
of the table at its four thresholds; `OverlapSweep` then has to give these back, and the Dice that the table states
within 0.01. It cannot be closer than what the frames differ by: the mean of the Dice of frames is less than the Dice of
the mean precision and recall, by 2 `SPREAD`^2 / (precision + recall), and the table does not state how they differed.
"""

import pytest
import torch

from vessel.metrics.overlap import OverlapSweep

THRESHOLDS = (0.10, 0.25, 0.50, 0.85)
DICE = (0.7631, 0.7800, 0.7674, 0.6672)
RECALL = (0.8936, 0.8342, 0.7543, 0.5656)
PRECISION = (0.6716, 0.7428, 0.7994, 0.8616)

# By how much one half of the frames finds more and is less right than the mean, and the other half the reverse.
SPREAD = 0.08
SIDE, VESSEL = 256, 16_000  # pixels a side, and of vessel: a quarter of the frame
# One probability between each two thresholds, so that none lies on one.
LEVELS = (0.03, 0.17, 0.4, 0.7, 0.95)


def frame(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities float32 [1, H, W] and mask bool [1, H, W], recall higher and precision lower by `spread`."""
    mask = torch.zeros(SIDE * SIDE, dtype=torch.bool)
    mask[:VESSEL] = True
    probability = torch.full((SIDE * SIDE,), LEVELS[0])
    for level, precision, recall in zip(LEVELS[1:], PRECISION, RECALL, strict=True):
        found = round((recall + spread) * VESSEL)
        wrong = round(found * (1 / (precision - spread) - 1))
        probability[:found] = level
        probability[VESSEL : VESSEL + wrong] = level
    return probability.view(1, SIDE, SIDE), mask.view(1, SIDE, SIDE)


@pytest.fixture(scope="module")
def curves():
    """Each metric at the four thresholds, means over twenty frames."""
    sweep = OverlapSweep(THRESHOLDS)
    frames = [frame(SPREAD if i % 2 else -SPREAD) for i in range(20)]
    sweep.update(
        [probability for probability, _ in frames],
        [mask for _, mask in frames],
        ids=[f"f{i}" for i in range(20)],
        patients=["p"] * 20,
        phrases=[["blood vessel"]] * 20,
    )
    return {name: values.tolist() for name, values in sweep.compute().items()}


def test_precision_and_recall_are_those_of_the_table(curves):
    assert curves["precision"] == pytest.approx(PRECISION, abs=5e-4)
    assert curves["recall"] == pytest.approx(RECALL, abs=5e-4)


def test_dice_peaks_at_a_quarter_and_is_near_the_table(curves):
    assert max(zip(curves["dice"], THRESHOLDS, strict=True))[1] == 0.25
    assert curves["dice"] == pytest.approx(DICE, abs=0.01)
    assert sorted(range(4), key=curves["dice"].__getitem__) == sorted(range(4), key=DICE.__getitem__)


def test_recall_falls_and_precision_rises(curves):
    assert curves["recall"] == sorted(curves["recall"], reverse=True)
    assert curves["precision"] == sorted(curves["precision"])
