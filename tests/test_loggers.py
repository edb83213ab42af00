import json

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from vessel.errors import VesselError
from vessel.loggers import JsonLines, PrivateWandb, log_figure, log_table


@pytest.fixture
def png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "figure.png")
    return tmp_path / "figure.png"


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_call_in_order(tmp_path):
    logger = JsonLines(tmp_path / "run")
    logger.log_metrics({"train/loss": 0.5, "epoch": 2}, step=7)
    logger.log_metrics({"val/dice": torch.tensor(0.25)}, step=8)
    first, second = lines(tmp_path / "run")
    assert list(first) == ["step", "epoch", "time", "train/loss"]
    assert (first["step"], first["epoch"], first["train/loss"]) == (7, 2, 0.5)
    assert list(second) == ["step", "time", "val/dice"]
    assert second["time"] >= first["time"] > 1.7e9


def test_numbers_that_json_lacks_become_null(tmp_path):
    JsonLines(tmp_path).log_metrics({"a": float("nan"), "b": float("-inf"), "c": 0.0}, step=0)
    (line,) = lines(tmp_path)
    assert (line["a"], line["b"], line["c"]) == (None, None, 0.0)


def test_resuming_appends_even_after_half_a_line(tmp_path):
    JsonLines(tmp_path).log_metrics({"a": 1.0}, step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "ti')
    JsonLines(tmp_path).log_metrics({"a": 2.0}, step=1)
    JsonLines(tmp_path).log_metrics({"a": 3.0}, step=2)
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text[i])["a"] for i in (0, 2, 3)] == [1.0, 2.0, 3.0]
    assert len(text) == 4


def test_other_ranks_are_silent(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    JsonLines(tmp_path).log_metrics({"a": 1.0}, step=0)
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_the_figure(tmp_path, png):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tb")
    log_figure([logger], "val/threshold_sweep", png, 5)
    log_table([logger], "table", ["a"], [[1]], 5)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (image,) = events.Images("val/threshold_sweep")
    assert (image.step, image.height, image.width) == (5, 6, 5)


def test_file_loggers_are_left_alone(tmp_path, png):
    loggers = [CSVLogger(tmp_path / "csv"), JsonLines(tmp_path / "jsonl")]
    log_figure(loggers, "f", png, 0)
    log_table(loggers, "t", ["a"], [[1]], 0)
    assert not (tmp_path / "csv").exists()
    assert not (tmp_path / "jsonl").exists()


@pytest.fixture
def wandb_logger(tmp_path, monkeypatch):
    """A logger that would fail at the start of a run: all it sends is refused before."""
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("wandb.init"))
    return lambda **options: PrivateWandb(save_dir=tmp_path / "0012345678", **options)


@pytest.mark.parametrize(
    "send",
    [
        lambda logger, _: logger.log_hyperparams({"data": {"phrases": ["of 0012345678"]}}),
        lambda logger, _: logger.log_metrics({"val/dice/0012345678": 1.0}),
        lambda logger, png: log_figure([logger], "panels/0012345678", png, 1),
        lambda logger, _: log_table([logger], "of 0012345678", ["a"], [[1]], 1),
        lambda logger, _: log_table([logger], "t", ["0012345678"], [[1]], 1),
        lambda logger, _: log_table([logger], "t", ["a"], [[1], ["Bell^Ana, 0012345678"]], 1),
    ],
    ids=["hyperparameters", "metric", "figure", "table", "column", "cell"],
)
def test_guard_D11_wandb_gets_no_raw_identifier(wandb_logger, png, send):
    with pytest.raises(VesselError, match=r"^W&B: .*\(.*0012345678.*\)"):
        send(wandb_logger(), png)


@pytest.mark.parametrize("options", [{"name": "0012345678"}, {"notes": "of 0012345678"}, {"tags": ["0012345678"]}])
def test_guard_D11_a_wandb_run_is_not_named_after_a_patient(wandb_logger, options):
    with pytest.raises(VesselError, match=r"^W&B: options "):
        wandb_logger(**options)


@pytest.mark.parametrize("variable", ["WANDB_NAME", "WANDB_NOTES", "WANDB_TAGS", "WANDB_RUN_GROUP"])
def test_guard_D11_nor_by_the_environment(wandb_logger, monkeypatch, variable):
    monkeypatch.setenv(variable, "a,0012345678")
    with pytest.raises(VesselError, match=f"^W&B: .*{variable} "):
        wandb_logger()


def test_counts_of_ten_digits_are_no_ids(wandb_logger):
    with pytest.raises(pytest.fail.Exception, match=r"^wandb\.init$"):  # nothing refused it before
        log_table([wandb_logger()], "parameters", ["group", "count"], [["all", 7612345678]], 1)
