"""Random numbers of a step that follow from its position in the run, so that no generator's state has to be kept."""

from __future__ import annotations

import random

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from vessel.batch import Batch

TRAINING, VALIDATION = 0, 1


class StepSeeds(Callback):
    """A seed of torch, numpy and python before each batch: by epoch (training only), batch and rank.

    A resumed run draws the random numbers of a run without a stop, and every validation samples the same points.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        seed_all(self.seed, TRAINING, trainer.current_epoch, batch_idx, trainer.global_rank)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        seed_all(self.seed, VALIDATION, 0, batch_idx, trainer.global_rank)


def seed_all(*numbers: int) -> None:
    """Seed every generator of the process from numbers >= 0, the devices' generators included."""
    first, second, third, fourth = (int(word) for word in np.random.SeedSequence(numbers).generate_state(4))
    torch.manual_seed(first << 32 | second)
    np.random.seed(third)
    random.seed(fourth)
