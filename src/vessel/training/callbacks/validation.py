"""The base of callbacks that collect the batches of a validation and draw a conclusion at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from vessel.batch import Batch, StepOutput


class ValidationCallback(Callback, ABC):
    """A callback of real validations: Lightning's sanity check before training is left out."""

    @abstractmethod
    def collect(self, trainer: Trainer, batch: Batch, outputs: StepOutput) -> None:
        """Take what is needed of a batch and of what the network made of it."""

    @abstractmethod
    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use what was collected, after the last batch. `ModelCheckpoint` saves later, in `on_validation_end`."""

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,  # type: ignore[override]  # what our tasks return
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self.collect(trainer, batch, outputs)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.conclude(trainer, pl_module)
