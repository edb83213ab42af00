"""Groups of a cache: who uses one, what all of them take, and which are removed for a new one.

A group has a lock beside its folder, `<root>/<group>.lock`, which is never removed: held in common by all who use the
group, alone by whoever removes it. Its content is the size that the group is to have, its time that of the last use.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from vessel import files as disk
from vessel.errors import VesselError
from vessel.files import PART, size_on_disk

readable = partial(disk.readable, below=".3g")  # an image may take far less than a megabyte
_LOCK = ".lock"
_DIGEST = re.compile(r"[0-9a-f]{32}")  # nothing of another name is ever removed


class Hold:
    """The use of a group: while it lasts nobody removes the folder. It ends with the process, however that ends.

    Whoever comes while nobody uses the group clears what killed writers left.

    Args:
        root: of the cache; made if need be, readable by its owner alone: features are made of patients' images.
        group: name of its folder.

    Raises:
        VesselError: the folder cannot be made, or its file system has no locks.
    """

    def __init__(self, root: Path, group: str) -> None:
        self.root, self.group = root, group
        with _told(root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _opened(root / f"{group}{_LOCK}")
            if _alone(self._lock):
                for left in (root / group).glob(f".*{PART}"):
                    left.unlink()
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            os.utime(self._lock.fileno())
            (root / group).mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """End the use."""
        self._lock.close()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def reserve(self, nbytes: int, limit: int) -> None:
        """Make room for `nbytes` more in this group, and keep it from others who ask.

        Groups that nobody uses are removed for it, those first that were used longest ago; none of them where that
        would not do.

        Args:
            nbytes: that will be written, more than 0.
            limit: of all groups together, bytes.

        Raises:
            VesselError: there is no room; says how much there is and what helps.
        """
        with _told(self.root), _planning(self.root):
            own, others = size_on_disk(self.root / self.group), list(_others(self.root, self.group))
            try:
                doomed = self._doomed(own + nbytes, nbytes, limit, others)
                for other in doomed:
                    shutil.rmtree(other.folder)
            finally:
                for other in others:
                    other.lock.close()
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(str(own + nbytes))
            self._lock.flush()

    def _doomed(self, whole: int, nbytes: int, limit: int, others: list[_Other]) -> list[_Other]:
        """The groups to remove."""
        idle = sorted((other for other in others if other.idle), key=lambda other: other.used)
        taken = whole + sum(other.size if other.idle else other.planned for other in others)
        promised = sum(other.planned - other.size for other in others if not other.idle)
        free = shutil.disk_usage(self.root).free - promised
        doomed: list[_Other] = []
        while (taken > limit or nbytes > free) and len(doomed) < len(idle):
            doomed.append(idle[len(doomed)])
            taken, free = taken - doomed[-1].size, free + doomed[-1].size
        if taken > limit:
            raise VesselError(
                f"{self.root}: the feature cache would take {readable(taken)} ({readable(nbytes)} of it new) and may "
                f"take {readable(limit)}: allow more with cache.max_gb={-(-taken // 10**9)}, end the runs that use "
                "other features there, remove folders that nobody needs, or leave the cache out with cache=none"
            )
        if nbytes > free:
            raise VesselError(
                f"{self.root}: the features that are missing take {readable(nbytes)} and {readable(free)} are "
                "free there; make room, name another disk with cache.root=FOLDER, or leave the cache out with "
                "cache=none"
            )
        return doomed


@dataclass(frozen=True)
class _Other:
    """Another group while room is made; an idle one is locked until its lock is closed."""

    folder: Path
    lock: TextIO
    idle: bool
    size: int
    planned: int  # at least `size`; what its users have reserved
    used: float


def _others(root: Path, group: str) -> Iterator[_Other]:
    for folder in root.iterdir():
        if folder.name == group or not _DIGEST.fullmatch(folder.name):
            continue
        file = folder.with_suffix(_LOCK)
        if not file.exists():  # not made here
            continue
        lock = _opened(file)
        idle, size, planned = _alone(lock), size_on_disk(folder), int(lock.read() or 0)
        yield _Other(folder, lock, idle, size, max(size, planned), file.stat().st_mtime)


def _opened(file: Path) -> TextIO:
    """A lock, at its beginning; made if need be."""
    return open(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="ascii")


def _alone(lock: TextIO) -> bool:
    """Take a lock for this process alone, unless somebody has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _planning(root: Path) -> Iterator[None]:
    """One process at a time."""
    with _opened(root / _LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _told(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VesselError(
            f"cache.root={root}: {error.strerror}; name a folder of yours on a disk with locks (a local one has them), "
            "or leave the cache out with cache=none"
        ) from error
