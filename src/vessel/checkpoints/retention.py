"""Removal of checkpoints that a run no longer needs; one that is half removed is never taken for a good one."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from vessel.checkpoints.reading import is_leftover, list_checkpoints, read_checkpoint, unfinished_path

_SAVER_FILE = re.compile(r"(best|last)-(\d+)(?:-v\d+)?\.ckpt")
_KEPT = ("best_model_path", "last_model_path")  # in the state of a ModelCheckpoint


def discard(path: Path) -> None:
    """Remove a file or folder that is no longer needed; log a warning where that fails.

    A folder gets the name of an unfinished save first, so that one of which half is gone is never taken for a
    checkpoint, and the next save removes the rest.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path if is_leftover(path) else path.rename(unfinished_path(path)))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logging.getLogger(__name__).warning("%s: could not be removed (%s)", path, error.strerror)


def discard_superseded(run: Path, resumed: Path, callbacks: Iterable[Callback]) -> None:
    """Remove checkpoints that a run resumed in its own folder no longer needs; one rank calls it, before training.

    A ModelCheckpoint never removes the checkpoint that was resumed from, nor one that it was about to remove when it
    was killed: with every resume one more would stay. Checkpoints newer than the resumed one stay, and so does every
    file that no ModelCheckpoint of the run writes, or one with `save_top_k` above 1.

    Args:
        run: folder of the run.
        resumed: checkpoint in it from which training is resumed.
        callbacks: of the trainer, each ModelCheckpoint among them.
    """
    single_savers = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.save_top_k == 1]
    kinds = {(saver.filename or "").partition("-")[0] for saver in single_savers}
    checkpoint = read_checkpoint(resumed)
    needed = {resumed.name} | {Path(path).name for path in _paths(checkpoint.get("callbacks", {}))}
    for path in list_checkpoints(run / "checkpoints"):
        saved = _SAVER_FILE.fullmatch(path.name)
        if saved and saved[1] in kinds and path.name not in needed and int(saved[2]) < checkpoint["global_step"]:
            discard(path)


def _paths(callbacks: Mapping[str, Any]) -> list[str]:
    """List the checkpoints that the callbacks of a run kept when a checkpoint was written."""
    # Keys of ModelCheckpoint, of subclasses too: `ModelCheckpoint{'monitor': ...}`.
    states = [state for name, state in callbacks.items() if "Checkpoint{" in name]
    kept = [path for state in states for path in state.get("best_k_models", {})]
    return [*kept, *(state[key] for state in states for key in _KEPT if state.get(key))]
