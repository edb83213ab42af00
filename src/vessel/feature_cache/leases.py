"""Leases on the namespaces of a cache: processes that use a namespace, disk space, and removal of unused ones.

A namespace has a lock file beside its folder, `<root>/<namespace>.lock`, which is never removed. Processes that use the
namespace share the lock; a process that removes it holds the lock exclusively. The content of the file is the size that
is reserved for the namespace, in bytes; its modification time is that of the last use.
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
_DIGEST = re.compile(r"[0-9a-f]{32}")  # a folder of another name is never removed


class Lease:
    """A lease on a namespace: until it is closed no process removes the folder. It ends with the process in any case.

    The first process that takes a lease removes unfinished files of killed writers.

    Args:
        root: folder of the cache; created if absent, readable by its owner alone, as features are made of patients'
            images.
        namespace: name of the folder in it.

    Raises:
        VesselError: the folder cannot be created, or its file system has no locks.
    """

    def __init__(self, root: Path, namespace: str) -> None:
        self.root, self.namespace = root, namespace
        with _explain_errors(root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _open_lock(root / f"{namespace}{_LOCK}")
            if _try_lock(self._lock):
                for leftover in (root / namespace).glob(f".*{PART}"):
                    leftover.unlink()
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            os.utime(self._lock.fileno())
            (root / namespace).mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """End the lease."""
        self._lock.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def reserve(self, nbytes: int, limit: int) -> None:
        """Reserve `nbytes` more for this namespace; other processes count them as taken.

        Namespaces without a lease are removed for it, the least recently used first; none is removed where that would
        not free enough.

        Args:
            nbytes: to be written, more than 0.
            limit: of all namespaces together, bytes.

        Raises:
            VesselError: there is not enough space; names the bytes and the options to change.
        """
        with _explain_errors(self.root), _exclusive(self.root):
            own, others = size_on_disk(self.root / self.namespace), list(_others(self.root, self.namespace))
            try:
                removed = self._choose_removals(own + nbytes, nbytes, limit, others)
                for other in removed:
                    shutil.rmtree(other.folder)
            finally:
                for other in others:
                    other.lock.close()
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(str(own + nbytes))
            self._lock.flush()

    def _choose_removals(
        self, whole: int, nbytes: int, limit: int, others: list[_OtherNamespace]
    ) -> list[_OtherNamespace]:
        """Choose the namespaces to remove, the least recently used first.

        Args:
            whole: bytes of this namespace when all is written.
            nbytes: of them to be written.
            limit: of all namespaces together, bytes.
            others: all other namespaces.

        Raises:
            VesselError: removing all unused ones would not free enough.
        """
        idle = sorted((other for other in others if other.idle), key=lambda other: other.used)
        taken = whole + sum(other.size if other.idle else other.reserved for other in others)
        promised = sum(other.reserved - other.size for other in others if not other.idle)
        free = shutil.disk_usage(self.root).free - promised
        removed: list[_OtherNamespace] = []
        while (taken > limit or nbytes > free) and len(removed) < len(idle):
            removed.append(idle[len(removed)])
            taken, free = taken - removed[-1].size, free + removed[-1].size
        if taken > limit:
            raise VesselError(
                f"{self.root}: the feature cache would take {readable(taken)} ({readable(nbytes)} of it new) and may "
                f"take {readable(limit)}: allow more with cache.max_gb={-(-taken // 10**9)}, end the runs that use "
                "other features there, remove folders that are not needed, or leave the cache out with cache=none"
            )
        if nbytes > free:
            raise VesselError(
                f"{self.root}: the features that are missing take {readable(nbytes)} and {readable(free)} are "
                "free there; free space, name another disk with cache.root=FOLDER, or leave the cache out with "
                "cache=none"
            )
        return removed


@dataclass(frozen=True)
class _OtherNamespace:
    """Another namespace while space is reserved; an idle one stays locked until `lock` is closed."""

    folder: Path
    lock: TextIO
    idle: bool
    size: int
    reserved: int  # by its users, bytes; at least `size`
    used: float


def _others(root: Path, namespace: str) -> Iterator[_OtherNamespace]:
    for folder in root.iterdir():
        if folder.name == namespace or not _DIGEST.fullmatch(folder.name):
            continue
        file = folder.with_suffix(_LOCK)
        if not file.exists():  # no namespace of a cache
            continue
        lock = _open_lock(file)
        idle, size, reserved = _try_lock(lock), size_on_disk(folder), int(lock.read() or 0)
        yield _OtherNamespace(folder, lock, idle, size, max(size, reserved), file.stat().st_mtime)


def _open_lock(file: Path) -> TextIO:
    """Open a lock file at its beginning; created if absent."""
    return open(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="ascii")


def _try_lock(lock: TextIO) -> bool:
    """Take a lock exclusively; return False if another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Let one process at a time reserve space."""
    with _open_lock(root / _LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _explain_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VesselError(
            f"cache.root={root}: {error.strerror}; name a folder of yours on a disk with locks (a local one has them), "
            "or leave the cache out with cache=none"
        ) from error
