"""Atomic writes of checkpoints: written under another name, flushed, and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from vessel.checkpoints.reading import backup_path, list_checkpoints, restore_backups, time_written, unfinished_path
from vessel.checkpoints.retention import discard
from vessel.errors import DISK_FULL, VesselError
from vessel.files import flush, put_in_place, readable, size_on_disk

# In messages of torch's zip writer when a write fails; it drops the reason.
_TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "iostream error")


@contextmanager
def atomic_write(path: Path, *, is_main: bool = True, agree: Callable[[bool], bool] | None = None) -> Iterator[Path]:
    """Write a file or folder so that a reader finds all of it or the one before, whenever this process dies.

    Where several ranks write into one folder, each of them enters with the same path and with `agree`; the folder
    exists when they begin. A rank that raises makes all of them raise; none waits for it. No code in the block may wait
    for other ranks after a write that can fail.

    Args:
        path: of the file or folder; the one before stays until the new one is complete.
        is_main: whether this rank creates, renames and removes; one rank does.
        agree: returns True if all ranks pass True, such as `trainer.strategy.reduce_boolean_decision`; each rank calls
            it as often as the others. None where one process writes.

    Yields:
        the path to write to, beside `path`; it does not exist yet where one process writes.

    Raises:
        VesselError: the disk is full, or a write fails; no part of the new one stays, the one before is intact.
    """
    part = unfinished_path(path)
    with _clean_up_on_error(path, is_main, agree):
        if is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
        if is_main and agree is not None:
            part.mkdir()
    with _clean_up_on_error(path, is_main, agree):
        yield part
        flush(part)
    with _clean_up_on_error(path, is_main, agree):
        if is_main:
            put_in_place(part, path, backup_path(path))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically and without a second copy in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            VesselError: there is not enough space.
        """
        if storage_options is not None:
            raise TypeError("checkpoints are local files, which have no storage_options")
        # For a file that torch opens itself, it drops the reason of an error and keeps the file open.
        with atomic_write(Path(path)) as part, part.open("wb") as stream:
            torch.save(checkpoint, stream)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, or the folder of a run that had several ranks before."""
        discard(Path(path))


@contextmanager
def defer_write_errors(engine: Any) -> Iterator[None]:
    """Let DeepSpeed save to its end on every rank, and raise the error of a write after that.

    All of its ranks wait for each other once their files are written: a rank that raised earlier would block them.

    Args:
        engine: `DeepSpeedEngine`, of which `save_checkpoint(..., save_latest=False)` is called in the block; `latest`,
            which the main rank writes after the others have finished, is for the caller to write.
    """
    errors: list[Exception] = []

    def deferred(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        return call

    writes = (
        (engine.checkpoint_engine, "save"),
        (engine.checkpoint_engine, "makedirs"),
        (engine, "_copy_recovery_script"),
    )
    for owner, name in writes:
        setattr(owner, name, deferred(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in writes:
            delattr(owner, name)
    if errors:
        raise errors[0]


@contextmanager
def _clean_up_on_error(path: Path, is_main: bool, agree: Callable[[bool], bool] | None) -> Iterator[None]:
    """Remove the unfinished save on an error, on all ranks once one of them has one, and raise a VesselError."""
    try:
        yield
    except BaseException as error:
        written = size_on_disk(unfinished_path(path))
        if agree is not None and isinstance(error, Exception):
            with suppress(RuntimeError):  # the process group may be gone; the first error is raised
                agree(False)
        if is_main:
            _discard_unfinished(unfinished_path(path))
        if isinstance(error, Exception) and (explained := _disk_error(path, error, written)) is not None:
            raise explained from error
        raise
    if agree is not None and not agree(True):
        if is_main:
            _discard_unfinished(unfinished_path(path))
        raise VesselError(
            f"{path}: not written, because another rank could not write its part; see the error of that rank"
        )


def _discard_unfinished(part: Path) -> None:
    """Remove an unfinished save; files that a failed writer still has open free their space at once."""
    for file in part.rglob("*.pt") if part.is_dir() else ():
        with suppress(OSError):
            os.truncate(file, 0)
    discard(part)


def _disk_error(path: Path, error: Exception, written: int) -> VesselError | None:
    """Turn an error of the disk into one for the user; None for any other error."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    os_error = next((e for e in chain if isinstance(e, OSError)), None)
    from_torch = any(isinstance(e, RuntimeError) and any(w in str(e) for w in _TORCH_WRITER) for e in chain)
    if os_error is None and not from_torch:
        return None
    is_full = os_error is None or os_error.errno in DISK_FULL
    reason = "the disk or the quota is full" if is_full else os_error.strerror  # type: ignore[union-attr]
    previous = max(list_checkpoints(path.parent), key=time_written, default=None)
    needed = max(written, 0 if previous is None else size_on_disk(previous))
    kept = (
        "there is no earlier checkpoint" if previous is None else f"the earlier checkpoint is intact: {previous.name}"
    )
    free = shutil.disk_usage(path.parent if path.parent.is_dir() else Path.home()).free
    return VesselError(
        f"{path}: not written, {reason}; it takes {readable(needed)} or more, {readable(free)} are free there. "
        f"No partial file stays, {kept}; free space and continue with resume=auto"
    )


def _remove_leftovers(path: Path) -> None:
    """Remove unfinished saves and outdated backups that killed saves left in the folder."""
    restore_backups(path.parent)
    for renamed in (unfinished_path, backup_path):
        for leftover in path.parent.glob(renamed(Path(f"*{path.suffix}")).name):
            discard(leftover)
