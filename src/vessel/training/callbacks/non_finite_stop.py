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
from vessel.training.callbacks.updates import is_update
from vessel.training.shards import gradient


class NonFiniteStop(Callback):
    """A stop before the optimizer step, on every rank at once, so that no weight and no checkpoint is touched."""

    def __init__(self) -> None:
        self._ids: list[str] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._ids = []
        self._ids.extend(batch.ids)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss."""
        self._stop_unless(trainer, bool(torch.isfinite(loss)), f"the loss is {loss.item()}")

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the gradients: a finite loss can have ones that are not."""
        if not is_update(trainer):
            return
        norm = torch.zeros((), device=trainer.strategy.root_device)
        for parameter in pl_module.parameters():
            # One at a time: where the optimizer is on the host, each is copied to the device to be checked.
            if parameter.requires_grad and (part := gradient(parameter)) is not None:
                norm = torch.hypot(norm, torch.linalg.vector_norm(part.float()).to(norm.device))
        self._stop_unless(trainer, bool(torch.isfinite(norm)), f"the gradient norm is {norm.item()}")

    def _stop_unless(self, trainer: Trainer, finite: bool, what: str) -> None:
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        reports: list[tuple[bool, str, list[str]]] = [(finite, what, self._ids)] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(reports, (finite, what, self._ids))
        at_fault = [rank for rank, report in enumerate(reports) if not report[0]]
        where = "" if trainer.world_size == 1 else f" on rank {', '.join(map(str, at_fault))}"
        # The gradient is reduced over the ranks by now: which images made it so is not known.
        of_ranks = at_fault if "loss" in what else range(len(reports))
        ids = ", ".join(image for rank in of_ranks for image in reports[rank][2])
        raise VesselError(
            f"step {trainer.global_step}: {reports[at_fault[0]][1]}{where}; images of the step: {ids}; "
            f"last good checkpoint: {_last_checkpoint(trainer) or 'none yet'}. Look at these images and masks, then "
            "resume from it with a lower learning rate, clipping or longer warm-up"
        )


def _last_checkpoint(trainer: Trainer) -> str:
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    paths = [c.last_model_path for c in saved] + [c.best_model_path for c in saved]
    return next((path for path in paths if path), "")
