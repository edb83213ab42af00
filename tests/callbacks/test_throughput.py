import json
import time

import pytest

from vessel.callbacks.throughput import Throughput
from vessel.loggers import JsonLines


def test_logs_rates_and_the_global_batch_once(tmp_path, trainer, toy_task, batches):
    class Slow(toy_task):
        def training_step(self, batch, batch_idx):
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

        def on_validation_start(self):
            time.sleep(0.3)

    run = trainer(Throughput(), accumulate_grad_batches=2, val_check_interval=2, logger=JsonLines(tmp_path))
    run.fit(Slow(), batches(6), batches(1))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["throughput/global_batch"] for line in lines if "throughput/global_batch" in line] == [4]
    last = [line for line in lines if "throughput/samples_per_second" in line][-1]
    assert 0.04 <= last["throughput/seconds_per_step"] < 0.2  # validation is left out
    rate = 2 * 2 / last["throughput/seconds_per_step"]
    assert last["throughput/samples_per_second"] == pytest.approx(rate, rel=1e-5)
