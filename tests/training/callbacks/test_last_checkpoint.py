import json

import pytest
import torch

from vessel.loggers import JsonLines
from vessel.training.callbacks.last_checkpoint import LastCheckpoint


class Killed(BaseException):
    pass


class KilledWhenSaved(LastCheckpoint):
    def _save_checkpoint(self, trainer, filepath):
        super()._save_checkpoint(trainer, filepath)
        raise Killed


@pytest.fixture
def logging_task(toy_task):
    class LoggingTask(toy_task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss.detach())
            return loss

    return LoggingTask


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_a_checkpoint_holds_has_its_line(tmp_path, trainer, logging_task, batches):
    """A run killed when its checkpoint had just got its name goes on after that step, and never comes back to it."""
    save = {"dirpath": tmp_path / "checkpoints", "filename": "last-{step:06d}", "auto_insert_metric_name": False}
    saver = KilledWhenSaved(**save, every_n_train_steps=2)
    with pytest.raises(Killed):
        trainer(saver, logger=JsonLines(tmp_path), enable_checkpointing=True).fit(logging_task(), batches())
    assert torch.load(tmp_path / "checkpoints/last-000002.ckpt", weights_only=True)["global_step"] == 2
    assert [(line["step"], "train/loss" in line) for line in lines(tmp_path)] == [(0, True), (1, True)]


def test_each_step_has_one_line(tmp_path, trainer, logging_task, batches):
    save = {"dirpath": tmp_path / "checkpoints", "filename": "last-{step:06d}", "auto_insert_metric_name": False}
    saver = LastCheckpoint(**save, every_n_train_steps=2)
    options = {"logger": JsonLines(tmp_path), "enable_checkpointing": True, "accumulate_grad_batches": 2}
    trainer(saver, **options).fit(logging_task(), batches(6))
    assert [(line["step"], line["epoch"]) for line in lines(tmp_path)] == [(0, 0), (1, 0), (2, 0)]
