"""Old checkpoints are removed once newer ones are complete; those of other runs and of the user stay."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.checkpoints.conftest import killed, write_folder
from torch.utils.data import DataLoader

from vessel.checkpoints.reading import find_defect, find_newest_intact
from vessel.checkpoints.retention import discard, discard_superseded
from vessel.checkpoints.writing import AtomicCheckpointIO


class Line(LightningModule):
    """A line to fit, whose score gets better for two steps and then worse."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.log("score", torch.tensor(-abs(2.0 - self.global_step)))
        return self.line(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vessel"] = {"name": "line"}


class CheckingIO(AtomicCheckpointIO):
    """Checks at each removal that another intact checkpoint exists."""

    def remove_checkpoint(self, path):
        assert find_newest_intact(Path(path).parents[1])[0] not in (None, Path(path))
        super().remove_checkpoint(path)


def fit(run: Path, steps: int, ckpt: Path | None = None, **kept: int) -> None:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=savers(run, **kept), plugins=[CheckingIO()],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=run,
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(torch.ones(20, 1)), ckpt_path=ckpt, weights_only=True)


def savers(run: Path, **kept: int) -> list[ModelCheckpoint]:
    """Make the two callbacks of `conf/callbacks`, saving after each step."""
    often = {"dirpath": run / "checkpoints", "every_n_train_steps": 1, "auto_insert_metric_name": False}
    return [
        ModelCheckpoint(filename="best-{step:06d}", monitor="score", mode="max", **often),
        ModelCheckpoint(filename="last-{step:06d}", **often, **kept),
    ]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def content_of(*files: Path) -> list[bytes]:
    return [file.read_bytes() for file in files]


@pytest.fixture
def finished(tmp_path) -> Path:
    """Train a run of four steps."""
    fit(tmp_path / "first", 4)
    return tmp_path / "first"


def test_a_run_keeps_its_best_and_its_last(finished):
    assert names(finished) == ["best-000003.ckpt", "last-000004.ckpt"]
    assert find_newest_intact(finished) == (finished / "checkpoints/last-000004.ckpt", [])


def test_guard_W9_retention_never_touches_inputs(finished, tmp_path):
    """Keep the given checkpoint of another run, base weights and the user's own files, byte by byte."""
    given = finished / "checkpoints/last-000004.ckpt"
    run = tmp_path / "second"
    (run / "checkpoints").mkdir(parents=True)
    others = [run / "checkpoints" / name for name in ("base.pt", "last-mine.ckpt", "best.ckpt", ".hidden.ckpt")]
    for number, file in enumerate(others):
        file.write_bytes(bytes([number]))
    inputs = [given, finished / "checkpoints/best-000003.ckpt", *others]
    were = content_of(*inputs)
    fit(run, 7, given)
    discard_superseded(run, run / "checkpoints/last-000007.ckpt", savers(run))
    assert content_of(*inputs) == were
    assert {"last-000007.ckpt"} | {file.name for file in others} <= set(names(run))


def test_guard_W9_the_checkpoint_that_a_run_is_resumed_from_stays(finished):
    given = finished / "checkpoints/last-000004.ckpt"
    were = content_of(given)
    fit(finished, 7, given)
    assert content_of(given) == were
    assert find_newest_intact(finished)[0] == finished / "checkpoints/last-000007.ckpt"


def test_a_run_that_is_resumed_often_does_not_fill_the_disk(finished):
    """Resume several times: best, last and the one resumed from stay, though ModelCheckpoint removes no resumed one."""
    for steps in (6, 8, 10):
        good, _ = find_newest_intact(finished)
        discard_superseded(finished, good, savers(finished))
        fit(finished, steps, good)
        assert len(names(finished)) <= 3
    assert names(finished) == ["best-000003.ckpt", "last-000008.ckpt", "last-000010.ckpt"]
    assert [find_defect(finished / "checkpoints" / name) for name in names(finished)] == [None] * 3


def test_checkpoints_that_are_all_to_be_kept_stay(tmp_path):
    """Keep all where `save_top_k=-1`; without a metric ModelCheckpoint does not list those that it keeps."""
    fit(tmp_path, 4, save_top_k=-1)
    were = names(tmp_path)
    good, _ = find_newest_intact(tmp_path)
    discard_superseded(tmp_path, good, savers(tmp_path, save_top_k=-1))
    assert names(tmp_path) == were
    assert len(were) == 5


def test_what_is_newer_than_the_resumed_one_stays(finished):
    """Keep a newer one that could not be read, for the user to find out why."""
    damaged = finished / "checkpoints/last-000009.ckpt"
    damaged.write_bytes(b"")
    good, _ = find_newest_intact(finished)
    discard_superseded(finished, good, savers(finished))
    assert names(finished) == ["best-000003.ckpt", "last-000004.ckpt", "last-000009.ckpt"]


def test_guard_W9_a_folder_half_removed_is_no_checkpoint(tmp_path):
    dies, calls = True, 0
    while dies:
        calls += 1
        run = tmp_path / str(calls)
        new = write_folder(run / "checkpoints/last-000002.ckpt", 2, ranks=1)
        old = write_folder(run / "checkpoints/last-000001.ckpt", 1, ranks=1)
        dies = killed(lambda old=old: discard(old), calls)
        assert find_newest_intact(run) == (new, [])
        assert not old.exists() or find_defect(old) is None
    assert calls > 5


def test_a_failed_removal_is_logged_and_not_raised(tmp_path, monkeypatch, caplog):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    old = write_folder(tmp_path / "last-000001.ckpt", 1)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    discard(old)
    assert "last-000001.ckpt: could not be removed (Permission denied)" in caplog.text
