"""Files and folders on the disk: written whole, read as JSON, measured."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vessel.errors import VesselError

PART = ".part"  # suffix of a file or folder that is still being written; its name begins with a dot


def write_file(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file so that a reader finds all of it or what was there before, also after a power cut.

    Args:
        path: in a folder that exists.
        content: text is written as UTF-8.
        private: whether only the owner may read it (mode 0600).

    Raises:
        OSError: the disk refuses it; what was there before stays, and nothing half-written does.
    """
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """Write JSON by `write_file`, with a line break at its end; `indent=None` writes it in one line."""
    separators = (",", ":") if indent is None else None
    write_file(path, json.dumps(content, indent=indent, separators=separators, ensure_ascii=False) + "\n")


@contextmanager
def write_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder so that it has its name only once it is whole.

    An error in the block removes what was written, and folders above it that were made for it; what was at `path`
    stays as it was.

    Args:
        path: of the folder.
        overwrite: whether a file or folder that is there is replaced.

    Yields:
        an empty, hidden folder beside `path` to write into.

    Raises:
        VesselError: `path` exists and `overwrite` is not set.
    """
    if path.exists() and not overwrite and (path.is_file() or any(path.iterdir())):
        raise VesselError(f"{path} exists already; choose another path, or remove it")
    new_parents = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    part.mkdir()
    try:
        yield part
        flush(part)
        put_in_place(part, path, path.with_name(f"{part.name}.old"))
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # not empty
                parent.rmdir()
        raise


def flush(path: Path) -> None:
    """Flush a file, or every file and folder of a folder, to the disk."""
    for inner in sorted(path.rglob("*"), reverse=True) if path.is_dir() else ():
        _flush_one(inner)
    _flush_one(path)


def put_in_place(part: Path, path: Path, aside: Path) -> None:
    """Rename a whole file or folder over what is at `path`.

    Nothing can be renamed over a folder, so a folder that is there is first moved aside; it comes back when the rename
    fails, and is removed when it has succeeded.

    Args:
        part: flushed, on the disk of `path`.
        path: its name.
        aside: free, on the same disk.
    """
    if path.exists() and (path.is_dir() or part.is_dir()):
        os.replace(path, aside)
    try:
        os.replace(part, path)
    except OSError:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise
    _flush_one(path.parent)
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink(missing_ok=True)


def _flush_one(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read_json(file: Path, remedy: str = "copy it again") -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        VesselError: no JSON object; ends with the remedy.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VesselError(f"{file} cannot be read ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise VesselError(f"{file} holds no object; {remedy}")
    return content


def size_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder; 0 where nothing is."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(_size(file) for file in files)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:  # another process removes or renames it meanwhile
        return 0


def readable(nbytes: float, *, below: str = ".1f") -> str:
    """Format a number of bytes: `5.12 GB`, or `8.4 MB` below one of them, in the format that `below` names."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:{below}} MB"


def require_space(folder: Path, nbytes: int, what: str, remedy: str) -> None:
    """Refuse to write more than the disk has room for.

    Args:
        folder: to write into; it need not exist yet.
        nbytes: to write, beside what is there already.
        what: name of the content, in the plural.
        remedy: what helps beside making room.

    Raises:
        VesselError: with the bytes needed and free, and the remedy.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise VesselError(
            f"{folder}: {what} take {readable(nbytes)} and {readable(free)} are free there; make room, {remedy}"
        )
