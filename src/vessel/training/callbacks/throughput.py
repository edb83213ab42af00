"""The speed of a run, and the number of samples of an optimizer step over all ranks."""

from __future__ import annotations

import logging
from collections import deque
from time import perf_counter

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from vessel.batch import Batch

log = logging.getLogger(__name__)


class Throughput(Callback):
    """A meter: `throughput/samples_per_second` of all ranks, `throughput/seconds_per_step` and, once, the global batch.

    Time runs from the end of one batch to the end of the next, waiting for data included, validation excluded.

    Args:
        window: batches to average over.
    """

    def __init__(self, window: int = 50) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=window)
        self._last = 0.0
        self._announced = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = perf_counter()  # a run that is resumed within an epoch does not start it

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = perf_counter()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if self._announced:
            return
        self._announced = True
        total = len(batch) * trainer.world_size * trainer.accumulate_grad_batches
        if trainer.is_global_zero:
            parts = len(batch), trainer.world_size, trainer.accumulate_grad_batches
            log.info("global batch: %d samples x %d ranks x %d accumulated = %d", *parts, total)
        for logger in trainer.loggers:
            logger.log_metrics({"throughput/global_batch": total}, step=trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        now = perf_counter()
        self._recent.append((now - self._last, len(batch)))
        self._last = now
        seconds, samples = (sum(column) for column in zip(*self._recent, strict=True))
        rates = {
            "throughput/samples_per_second": samples * trainer.world_size / seconds,
            "throughput/seconds_per_step": seconds / len(self._recent) * trainer.accumulate_grad_batches,
        }
        pl_module.log_dict(rates, on_step=True, on_epoch=False, batch_size=len(batch))
