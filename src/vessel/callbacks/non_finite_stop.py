"""Stop a run at the first loss or gradient that is not a number, while the weights are still good."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from vessel.batch import Batch
from vessel.errors import VesselError


class NonFiniteStop(Callback):
    """Raise before the optimizer step, on every rank at once, so that no weight and no checkpoint is touched by it."""

    def __init__(self) -> None:
        self._ids: list[str] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._ids = []
        self._ids.extend(batch.ids)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss."""
        self._stop_unless(trainer, bool(torch.isfinite(loss)), f"the loss is {loss.item()}")

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients: a finite loss can have ones that are not."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._stop_unless(trainer, bool(torch.isfinite(norm)), f"the gradient norm is {norm.item()}")

    def _stop_unless(self, trainer: Trainer, finite: bool, what: str) -> None:
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        if finite:
            what = "another rank met a loss or gradient that is not finite"
        raise VesselError(
            f"step {trainer.global_step}: {what}; images of the step on this rank: {', '.join(self._ids)}; "
            f"last good checkpoint: {_last_checkpoint(trainer) or 'none yet'}. Look at these images and masks, then "
            "resume from it with a lower learning rate, clipping or longer warm-up"
        )


def _last_checkpoint(trainer: Trainer) -> str:
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    paths = [c.last_model_path for c in saved] + [c.best_model_path for c in saved]
    return next((path for path in paths if path), "")
