"""A callback that makes trouble at a given place of a real run: `+callbacks.trouble._target_=tests.trouble.Trouble`."""

import os
import signal
import time

from lightning.pytorch import Callback

from vessel.errors import VesselError


class Trouble(Callback):
    """Do `what` before batches: once, in training step `step` or in a `validation`, on one rank (-1: on all).

    A signal of a step after the last comes when no batch follows.
    `slow` waits a little in every step instead, so that a signal from outside meets a run that is under way.
    """

    def __init__(self, what: str, rank: int = 1, step: int = 1, validation: bool = False) -> None:
        self.what, self.rank, self.step, self.validation = what, rank, step, validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.validation:
            self._make(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.validation:
            self._make(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.what.startswith("SIG"):
            self._make(trainer)

    def _make(self, trainer):
        if self.what == "slow":
            time.sleep(0.2)
        elif trainer.global_step == self.step and self.rank in (-1, trainer.global_rank):
            self.step = -1
            if self.what.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.what))
            elif self.what == "refuse":
                raise VesselError("a bad image; look at it")
            elif self.what == "fail":
                raise ZeroDivisionError("a defect")
            elif self.what == "hang":
                time.sleep(600)


def trouble(what: str, **where: object) -> tuple[str, ...]:
    """Options that put the callback into a run."""
    target = "+callbacks.trouble._target_=tests.trouble.Trouble"
    return (target, f"+callbacks.trouble.what={what}", *(f"+callbacks.trouble.{k}={v}" for k, v in where.items()))
