"""Errors that a user can fix: what was wrong, where, and what to do. They reach the terminal without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class VesselError(ValueError):
    """Bad input or a refused action; the message names what, where and the remedy."""


@dataclass(frozen=True)
class Problem:
    """One bad item of a folder.

    Attributes:
        where: file, and the index inside it where there is one.
        reason: what is wrong.
        remedy: what the user can do.
    """

    where: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}; {self.remedy}"


class BadItemsError(VesselError):
    """Every bad item of an input, reported at once."""

    def __init__(self, what: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  {p}" for p in self.problems)
        super().__init__(f"{what}: {len(self.problems)} bad item(s), nothing was written\n{lines}")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the host or of a GPU is too small."""
    import torch
    from lightning.pytorch.utilities.memory import is_oom_error  # seconds, which only a failure costs

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_oom_error(error)


def user_message(error: BaseException) -> str | None:
    """Return the message of a `VesselError`, even if a library wrapped it, or of a full disk; None for others."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, VesselError):
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return f"{cause.filename or 'a file of the run'}: not written, the disk or the quota is full; make room"
        cause = cause.__cause__ or cause.__context__
    # A loader's worker process sends its traceback as the message; the user's part comes last.
    return None if cause is None else str(cause).rpartition("vessel.errors.VesselError: ")[2].rstrip()
