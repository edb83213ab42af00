"""Checkpoints that are whole or absent: written beside their place, flushed, and renamed onto it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from vessel.checkpoints.reading import aside_of, checkpoints_in, part_of, put_back, time_written
from vessel.checkpoints.retention import discard
from vessel.errors import DISK_FULL, VesselError
from vessel.files import flush, put_in_place, readable, size_on_disk

# What torch's zip writer says when the system refuses its bytes; it drops the reason.
_TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "iostream error")


@contextmanager
def whole(path: Path, *, is_main: bool = True, agree: Callable[[bool], bool] | None = None) -> Iterator[Path]:
    """Write a file or folder so that a reader sees all of it or what was there before, whenever this process dies.

    Several ranks write into one folder: each of them enters with the same path and with `agree`; the folder is there
    when they begin. A rank that raises makes all of them raise; none waits for it. Nothing in the block may wait for
    other ranks after a write that can fail.

    Args:
        path: where it shall be; what is there stays until the new one is complete.
        is_main: whether this rank makes, renames and removes; one rank does.
        agree: whether all ranks say yes, such as `trainer.strategy.reduce_boolean_decision`; each rank calls it as
            often as the others. None where one process writes.

    Yields:
        the place to write to, beside `path`; not there yet where one process writes.

    Raises:
        VesselError: the disk is full, or refuses to take it; nothing of it stays there, the one before is intact.
    """
    part = part_of(path)
    with _told(path, is_main, agree):
        if is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
        if is_main and agree is not None:
            part.mkdir()
    with _told(path, is_main, agree):
        yield part
        flush(part)
    with _told(path, is_main, agree):
        if is_main:
            put_in_place(part, path, aside_of(path))


class WholeFiles(TorchCheckpointIO):
    """Lightning's single files, whole or absent, and without a second copy of them in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            VesselError: there is no room for it.
        """
        if storage_options is not None:
            raise TypeError("checkpoints are local files, which have no storage_options")
        # Of a file that it opens itself, torch drops the reason of an error, and keeps it open with what it wrote.
        with whole(Path(path)) as part, part.open("wb") as stream:
            torch.save(checkpoint, stream)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, or the folder of a run that had several ranks before."""
        discard(Path(path))


@contextmanager
def errors_last(engine: Any) -> Iterator[None]:
    """Let DeepSpeed save to its end on every rank, and raise the error of a write after that.

    All of its ranks wait for each other once their files are written: one that raised before would never come.

    Args:
        engine: `DeepSpeedEngine`, of which `save_checkpoint(..., save_latest=False)` is called in the block; `latest`,
            which the main rank writes after the others have come, is for the caller to write.
    """
    errors: list[Exception] = []

    def kept(write: Callable[..., Any]) -> Callable[..., Any]:
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
        setattr(owner, name, kept(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in writes:
            delattr(owner, name)
    if errors:
        raise errors[0]


@contextmanager
def _told(path: Path, is_main: bool, agree: Callable[[bool], bool] | None) -> Iterator[None]:
    """On an error remove what was written, on all ranks once one of them has one, and say what happened."""
    try:
        yield
    except BaseException as error:
        begun = size_on_disk(part_of(path))
        if agree is not None and isinstance(error, Exception):
            with suppress(RuntimeError):  # the group may be gone; what failed first is told
                agree(False)
        if is_main:
            _drop(part_of(path))
        if isinstance(error, Exception) and (refusal := _refusal(path, error, begun)) is not None:
            raise refusal from error
        raise
    if agree is not None and not agree(True):
        if is_main:
            _drop(part_of(path))
        raise VesselError(f"{path}: not written, because another rank could not write its part; its message says why")


def _drop(part: Path) -> None:
    """Remove an unfinished save; files that a failed writer still holds open give their room back at once."""
    for file in part.rglob("*.pt") if part.is_dir() else ():
        with suppress(OSError):
            os.truncate(file, 0)
    discard(part)


def _refusal(path: Path, error: Exception, begun: int) -> VesselError | None:
    """Turn an error of the disk into one for the user; None for any other error."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    refused = next((e for e in chain if isinstance(e, OSError)), None)
    from_torch = any(isinstance(e, RuntimeError) and any(w in str(e) for w in _TORCH_WRITER) for e in chain)
    if refused is None and not from_torch:
        return None
    is_full = refused is None or refused.errno in DISK_FULL
    reason = "the disk or the quota is full" if is_full else refused.strerror  # type: ignore[union-attr]
    before = max(checkpoints_in(path.parent), key=time_written, default=None)
    needed = max(begun, 0 if before is None else size_on_disk(before))
    kept = "no checkpoint was there before" if before is None else f"the checkpoint before is intact: {before.name}"
    free = shutil.disk_usage(path.parent if path.parent.is_dir() else Path.home()).free
    return VesselError(
        f"{path}: not written, {reason}; it takes {readable(needed)} or more, {readable(free)} are free there. "
        f"Nothing half-written stays, {kept}; free space and go on with resume=auto"
    )


def _remove_leftovers(path: Path) -> None:
    """Clear what killed saves left in the folder: unfinished ones, and earlier ones that were moved aside."""
    put_back(path.parent)
    for place in (part_of, aside_of):
        for leftover in path.parent.glob(place(Path(f"*{path.suffix}")).name):
            discard(leftover)
