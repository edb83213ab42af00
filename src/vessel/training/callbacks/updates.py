"""Batches at whose end the optimizer really steps."""

from __future__ import annotations

from lightning.pytorch import Trainer


def is_update(trainer: Trainer) -> bool:
    """Return True if the present batch completes an optimizer step.

    DeepSpeed counts accumulated batches itself, so that Lightning calls the optimizer's hooks at each of them.
    """
    return not trainer.fit_loop._should_accumulate()
