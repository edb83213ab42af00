import json

import pytest

from vessel.callbacks.throughput import Throughput
from vessel.loggers import JsonLines


def test_logs_rates_and_the_global_batch_once(tmp_path, trainer, toy_task, batches, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr("vessel.callbacks.throughput.perf_counter", lambda: clock["now"])

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
