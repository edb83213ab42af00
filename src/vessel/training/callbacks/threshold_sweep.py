"""Choose the probability threshold on the validation set, and keep it in the checkpoint of the same weights."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from vessel.batch import Batch, StepOutput
from vessel.loggers import log_figure, log_table
from vessel.metrics.overlap import OVERLAP_METRICS, OverlapSweep
from vessel.metrics.thresholds import THRESHOLDS, best_index
from vessel.plotting.panels import sweep_figure
from vessel.training.callbacks.validation import ValidationCallback


class ThresholdSweep(ValidationCallback):
    """A scorer of every validation at many thresholds; it logs `val/dice_best` and `val/threshold`.

    The best threshold has the highest mean Dice over images; of equals, the one nearest 0.5. A checkpoint holds it as
    `checkpoint["callbacks"]["ThresholdSweep"]["threshold"]`, up to date when `ModelCheckpoint` saves after the
    validation. Only validation hooks exist here: a threshold is never chosen on test images.

    Curve, figure and table go to `<run>/threshold_sweep/` and to the loggers.
    """

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS) -> None:
        self.sweep = OverlapSweep(thresholds)
        self.threshold: float | None = None
        self.curve: dict[str, list[float]] = {}
        self.step: int | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the last validation's threshold and curve, and its step, as plain numbers and lists."""
        return {"threshold": self.threshold, "curve": self.curve, "step": self.step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.threshold, self.curve, self.step = (state_dict[key] for key in ("threshold", "curve", "step"))

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sweep = self.sweep.to(pl_module.device)
        self.sweep.reset()

    @override
    def collect(self, trainer: Trainer, batch: Batch, outputs: StepOutput) -> None:
        """Add the scores of a batch at every threshold."""
        assert batch.masks is not None
        self.sweep.update(
            outputs.probabilities, batch.masks, ids=batch.ids, patients=batch.patients, phrases=batch.phrases
        )

    @override
    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the threshold, log it, and write the curve."""
        scores = self.sweep.compute()
        self.curve = {"threshold": list(self.sweep.thresholds)} | {
            name: scores[name].tolist() for name in OVERLAP_METRICS
        }
        self.step = trainer.global_step
        best = best_index(self.curve["threshold"], self.curve["dice"])
        self.threshold = self.curve["threshold"][best]
        logged = {"val/dice_best": self.curve["dice"][best], "val/threshold": self.threshold}
        pl_module.log_dict(logged, sync_dist=True)  # equal on all ranks already; without it Lightning warns
        if trainer.is_global_zero:
            self._write(trainer, Path(trainer.default_root_dir) / "threshold_sweep")

    def _write(self, trainer: Trainer, folder: Path) -> None:
        assert self.threshold is not None
        assert self.step is not None
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(zip(*self.curve.values(), strict=True))
        with (folder / "threshold_sweep.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(self.curve), *rows])
        figure = folder / f"step_{trainer.global_step:06d}.png"
        sweep_figure(self.curve, self.threshold).savefig(figure)
        log_figure(trainer.loggers, "val/threshold_sweep", figure, self.step)
        log_table(trainer.loggers, "val/threshold_sweep_table", list(self.curve), rows, self.step)
