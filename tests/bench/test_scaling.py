"""Each size is measured, and runs on ranks have options that `vessel.train` knows."""

import json

import pytest
from hydra import compose, initialize_config_dir

from bench import scaling
from vessel.cli.conf import CONF
from vessel.training.settings import check


@pytest.mark.slow
def test_every_cost_is_measured(monkeypatch):
    for axis in ("IMAGES", "PHRASES", "BATCHES"):
        monkeypatch.setattr(scaling, axis, (1, 2))
    monkeypatch.setattr(scaling, "TILES", (1, 3))
    monkeypatch.setattr(scaling, "_ROUNDS", 1)
    monkeypatch.setattr(scaling, "_ranks", lambda: {"1": 0.2, "2": 0.1})  # minutes, of commands that have own tests
    found = scaling.scaling()
    assert len(found) == 8
    assert all(seconds > 0 for row in found.values() for seconds in row.values())
    assert found["prediction of 2 images against tiles"].keys() == {"1", "3"}
    lines = scaling.table(found)
    assert lines[-1] == "| training, an image, against ranks of one core | 1: 0.200 (1.00) | 2: 0.100 (0.50) |  |  |"
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("ranks", scaling.RANKS)
def test_a_run_on_ranks_is_one_that_training_knows(ranks):
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("train", [*scaling._training(ranks), "run=."])
    check(config)
    assert config.trainer.devices == ranks
    assert config.callbacks.throughput.window == 1
    assert config.trainer.max_steps > scaling._WARMING_UP


def test_rates_are_those_of_steps_that_are_warm(tmp_path):
    lines = [{"step": 0, "lr": 1}, *({"step": s, "throughput/samples_per_second": s + 0.5} for s in range(7))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert list(scaling._rates(tmp_path)) == [4.5, 5.5, 6.5]
