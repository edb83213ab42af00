"""The settings of AdamW and its schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of AdamW with linear warm-up, then cosine to `final` of the learning rate, by optimizer steps.

    Attributes:
        lr: highest learning rate.
        weight_decay: on matrices; vectors (biases, norms, scales) do not decay.
        betas: of AdamW.
        warmup: fraction of all steps, 0 to 1.
        final: fraction of `lr` at the last step, 0 to 1.
    """

    lr: float = 4e-5
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    final: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """Compute the fraction of `lr` at optimizer step `step` (0-based) of `steps`."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
