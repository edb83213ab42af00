"""Order the callbacks of a run, so that no configuration has to list them in the order in which they must be called."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar

from vessel.training.callbacks.first_step_check import FirstStepCheck
from vessel.training.callbacks.graceful_stop import GracefulStop
from vessel.training.callbacks.last_checkpoint import LastCheckpoint
from vessel.training.callbacks.non_finite_stop import NonFiniteStop
from vessel.training.callbacks.step_seeds import StepSeeds

# Seeds come before whatever draws; a first gradient that is not finite is reported with its parameters.
FIRST = (StepSeeds, FirstStepCheck, NonFiniteStop)
# A stop comes after all that log, as nothing else of its step is called any more, and takes the terminal before a
# progress bar does. Checkpoints hold the states of all others, the last one also which checkpoint is the best.
LAST = (GracefulStop, ProgressBar, Checkpoint, LastCheckpoint)


def ordered(callbacks: Iterable[Callback]) -> list[Callback]:
    """Sort callbacks by when they must be called; those for which it does not matter keep their order in between."""
    return sorted(callbacks, key=_rank)


def _rank(callback: Callback) -> int:
    for position, kind in enumerate(FIRST):
        if isinstance(callback, kind):
            return position - len(FIRST)
    return max((position + 1 for position, kind in enumerate(LAST) if isinstance(callback, kind)), default=0)
