"""The newest state of a run, to go on from."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class LastCheckpoint(ModelCheckpoint):
    """One checkpoint, written after each validation, when the run is stopped, and at its end."""

    def save(self, trainer: Trainer) -> str:
        """Write it unless it is of this very step; every rank calls this.

        Returns:
            its path.
        """
        if self._last_global_step_saved != trainer.global_step:
            # In the way of the class, which then removes the one before.
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.best_model_path

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the steps since the last validation."""
        self.save(trainer)
