import json

import pytest
import torch

from vessel.loggers import JsonLines
from vessel.training.callbacks.throughput import Throughput
from vessel.training.resume import TrainingPosition, set_loop_counters


def test_logs_rates_and_the_global_batch_once(tmp_path, trainer, toy_task, batches, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr("vessel.training.callbacks.throughput.perf_counter", lambda: clock["now"])

    class Timed(toy_task):
        def training_step(self, batch, batch_idx):
            clock["now"] += 0.5
            return super().training_step(batch, batch_idx)

        def on_validation_start(self):
            clock["now"] += 100.0

    run = trainer(Throughput(), accumulate_grad_batches=2, val_check_interval=2, logger=JsonLines(tmp_path))
    run.fit(Timed(), batches(6), batches(1))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["throughput/global_batch"] for line in lines if "throughput/global_batch" in line] == [4]
    last = [line for line in lines if "throughput/samples_per_second" in line][-1]
    assert last["throughput/seconds_per_step"] == pytest.approx(1.0)  # two batches; validation is left out
    assert last["throughput/samples_per_second"] == pytest.approx(4.0)


def test_a_run_that_goes_on_within_an_epoch_counts_from_its_start(tmp_path, trainer, toy_task, batches, monkeypatch):
    clock = {"now": 1000.0}
    monkeypatch.setattr("vessel.training.callbacks.throughput.perf_counter", lambda: clock["now"])

    class Timed(toy_task):
        def training_step(self, batch, batch_idx):
            clock["now"] += 0.5
            return super().training_step(batch, batch_idx)

    first = trainer(max_steps=2)
    first.fit(Timed(), batches(6))
    loops = first._checkpoint_connector.dump_checkpoint()
    set_loop_counters(loops["loops"]["fit_loop"], TrainingPosition(0, 2), batches_in_epoch=6, by_steps=False)
    torch.save(loops, tmp_path / "stopped.ckpt")
    run = trainer(Throughput(), logger=JsonLines(tmp_path))
    run.fit(Timed(), batches(6), ckpt_path=tmp_path / "stopped.ckpt", weights_only=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["throughput/seconds_per_step"] for line in lines if "throughput/seconds_per_step" in line]
    assert rates == pytest.approx([0.5] * 4)
