"""The newest state of a run, to resume from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from vessel.loggers import JsonLines
from vessel.training.callbacks.updates import is_update


class LastCheckpoint(ModelCheckpoint):
    """A checkpoint that is written after each validation, when the run is stopped, and at its end."""

    def save(self, trainer: Trainer) -> str:
        """Write it unless it is of this very step; every rank calls this.

        Returns:
            its path.
        """
        if self._last_global_step_saved != trainer.global_step:
            # As the base class does, which then removes the one before.
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.best_model_path

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Write the metrics of the step first: a run killed in between resumes after it and never writes them."""
        connector = trainer._logger_connector
        if is_update(trainer) and connector.should_update_logs:
            numbers = {name: float(value) for name, value in connector.metrics["log"].items()}
            for logger in trainer.loggers:
                if isinstance(logger, JsonLines):
                    logger.log_metrics(
                        {**numbers, "epoch": trainer.current_epoch}, trainer.fit_loop.epoch_loop._batches_that_stepped
                    )
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the steps since the last validation."""
        self.save(trainer)
