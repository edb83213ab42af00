import csv

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from vessel.metrics.thresholds import THRESHOLDS
from vessel.training.callbacks.threshold_sweep import ThresholdSweep


def naive_curve(task, loader) -> list[float]:
    """Average the Dice over phrases, then over images; a phrase never predicted nor present scores 1."""
    scores = []
    with torch.no_grad():
        for batch in loader:
            for probability, masks in zip(task.validation_step(batch, 0).probabilities, batch.masks, strict=True):
                row = []
                for t in THRESHOLDS:
                    predicted = probability > t
                    total = (predicted.sum((1, 2)) + masks.sum((1, 2))).tolist()
                    overlap = (2 * (predicted & masks).sum((1, 2))).tolist()
                    row.append(sum(1 if n == 0 else o / n for o, n in zip(overlap, total, strict=True)) / 2)
                scores.append(row)
    return torch.tensor(scores).mean(0).tolist()


def test_default_thresholds():
    assert THRESHOLDS[:2] + THRESHOLDS[-1:] == (0.05, 0.1, 0.95)
    assert len(THRESHOLDS) == 19


def test_checkpoint_holds_the_threshold_of_its_own_weights(tmp_path, trainer, toy_task, batches):
    saver = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="val/dice_best", mode="max", save_top_k=-1, auto_insert_metric_name=False
    )
    # The saver first in the list: Lightning moves it to the end.
    trainer(saver, ThresholdSweep(), max_epochs=3, enable_checkpointing=True).fit(toy_task(lr=2), batches(), batches(2))
    curves = []
    for epoch in range(3):
        checkpoint = torch.load(tmp_path / f"{epoch}.ckpt", weights_only=True)
        state = checkpoint["callbacks"]["ThresholdSweep"]
        task = toy_task()
        task.load_state_dict(checkpoint["state_dict"])
        expected = naive_curve(task, batches(2))
        assert state["curve"]["dice"] == pytest.approx(expected)
        assert expected[THRESHOLDS.index(state["threshold"])] == pytest.approx(max(expected))
        assert state["step"] == checkpoint["global_step"]
        curves.append(tuple(expected))
    assert len(set(curves)) == 3  # the epochs differ, so a state one validation late would show
    assert float(saver.best_model_score) == pytest.approx(max(map(max, curves)))


def test_guard_I6_threshold_is_chosen_on_validation_only(trainer, toy_task, batches):
    sweep = ThresholdSweep()
    run = trainer(sweep)
    run.test(toy_task(), batches(), verbose=False)
    assert sweep.state_dict() == {"threshold": None, "curve": {}, "step": None}
    run.validate(toy_task(), batches(), verbose=False)
    chosen = sweep.state_dict()
    assert chosen["threshold"] in THRESHOLDS
    run.test(toy_task(lr=0.0), batches(1), verbose=False)
    assert sweep.state_dict() == chosen


def test_sanity_checking_leaves_no_trace(tmp_path, trainer, toy_task, batches):
    sweep = ThresholdSweep()
    trainer(sweep, num_sanity_val_steps=2, max_epochs=1, limit_val_batches=2, check_val_every_n_epoch=5).fit(
        toy_task(), batches(), batches()
    )
    assert sweep.threshold is None
    assert not (tmp_path / "threshold_sweep").exists()


def test_logs_and_writes_table_and_figure(tmp_path, trainer, toy_task, batches):
    sweep = ThresholdSweep([0.2, 0.5, 0.7])
    run = trainer(sweep, max_epochs=2)
    run.fit(toy_task(), batches(), batches())
    assert float(run.callback_metrics["val/threshold"]) == pytest.approx(sweep.threshold)
    assert float(run.callback_metrics["val/dice_best"]) == pytest.approx(max(sweep.curve["dice"]))
    with (tmp_path / "threshold_sweep" / "threshold_sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["threshold"]) for row in rows] == [0.2, 0.5, 0.7]
    assert [float(row["recall"]) for row in rows] == sweep.curve["recall"]
    assert (tmp_path / "threshold_sweep" / "step_000003.png").stat().st_size > 1000


def test_of_equal_thresholds_the_one_nearest_a_half_wins(trainer, toy_task, batches):
    """A network whose probabilities lie all on one side of the thresholds scores the same at each of them."""
    sweep, task = ThresholdSweep([0.1, 0.15, 0.2]), toy_task(lr=0.0)
    task.network.mask_decoder.bias.data.fill_(20.0)
    trainer(sweep, max_epochs=1).fit(task, batches(), batches())
    assert len(set(sweep.curve["dice"])) == 1
    assert sweep.threshold == 0.2


def test_state_survives_a_round_trip():
    sweep, other = ThresholdSweep(), ThresholdSweep()
    sweep.threshold, sweep.curve, sweep.step = 0.35, {"dice": [0.5]}, 7
    other.load_state_dict(sweep.state_dict())
    assert other.state_dict() == sweep.state_dict()
    assert other.state_key == "ThresholdSweep"
