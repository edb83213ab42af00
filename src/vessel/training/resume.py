"""The position of Lightning's loops: read when a checkpoint is written, set in a checkpoint that is loaded.

Lightning resumes by counters of batches and epochs, and takes from their differences at which moment the checkpoint was
written. Those counters hold for one number of ranks, count batches of a step that was not finished, and differ with the
hook that saved. So they are set again, for the position at which training really resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class TrainingPosition:
    """A position in training between two optimizer steps.

    Attributes:
        epoch: 0-based.
        batches: of the epoch, finished on each rank.
        validation_due: whether a validation belongs here that has not come to its end.
        validated: batches of the next step after which a validation was done already; 0 for none.
    """

    epoch: int
    batches: int
    validation_due: bool = False
    validated: int = 0


def training_position(trainer: Trainer) -> TrainingPosition:
    """Return the last position between two steps that training has reached; at the end of an epoch the next's start."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: int = _batches(trainer).processed
    epoch, length = epochs.completed, trainer.num_training_batches
    if epochs.started == epochs.completed:  # no epoch is under way
        if not 0 < batches < length:
            return TrainingPosition(epoch, 0)
        epoch -= 1  # Lightning counts an epoch in which it was stopped as completed
    if batches >= length:  # a step ends here even where the accumulation is not full
        return (
            TrainingPosition(epoch, int(length), True) if _validation_due(trainer) else TrainingPosition(epoch + 1, 0)
        )
    if begun := batches % trainer.accumulate_grad_batches:
        return TrainingPosition(epoch, batches - begun, validated=begun if _validated(trainer) else 0)
    return TrainingPosition(epoch, batches, batches > 0 and _validation_due(trainer))


def _validated(trainer: Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop.val_loop
    return trainer.validating and loop.batch_progress.current.completed >= sum(loop.max_batches)


def _validation_due(trainer: Trainer) -> bool:
    if trainer.validating:
        return not _validated(trainer)
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    in_batch_end = _batches(trainer).completed < _batches(trainer).processed
    return in_batch_end and fetcher is not None and loop._should_check_val_fx(fetcher)


def _batches(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.batch_progress.current


def set_loop_counters(
    loops: dict[str, Any], position: TrainingPosition, *, batches_in_epoch: int, by_steps: bool
) -> None:
    """Set the counters of a checkpoint's `fit_loop` so that Lightning resumes at `position`.

    In the middle of an epoch they are those of a save at the end of a training batch; where validation is due those of
    a save within it, before its first batch; else those between two epochs.

    Args:
        loops: changed in place.
        position: the one to resume at.
        batches_in_epoch: on each rank.
        by_steps: whether `max_steps` is set; Lightning then takes every start for one in the middle of an epoch.
    """
    begun = position.batches > 0
    due = begun and position.validation_due
    at_batch_end = not due and (begun or by_steps)
    total = position.epoch * batches_in_epoch + position.batches
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    epochs = _counts(begun=position.epoch + begun, processed=position.epoch)
    loops["epoch_progress"] = {"total": epochs, "current": dict(epochs)}
    loops["epoch_loop.batch_progress"] = {
        "total": _counts(begun=total, processed=total, completed=total - at_batch_end),
        "current": _counts(
            begun=position.batches, processed=position.batches, completed=position.batches - at_batch_end
        ),
        "is_last_batch": due and position.batches == batches_in_epoch,
    }
    validated = _counts(begun=int(due), processed=0)
    loops["epoch_loop.val_loop.batch_progress"] = {
        "total": validated, "current": dict(validated), "is_last_batch": False,
    }  # fmt: skip
    # The step that loggers are given; Lightning adds the last one when it has gone on.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - (due or at_batch_end)


def _counts(*, begun: int, processed: int, completed: int | None = None) -> dict[str, int]:
    done = processed if completed is None else completed
    return {"ready": begun, "started": begun, "processed": processed, "completed": done}
