"""What files take, and how it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vessel.errors import VesselError


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; 0 where nothing is."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(_size(file) for file in files)


def readable(nbytes: float, *, below: str = ".1f") -> str:
    """`5.12 GB`, or `8.4 MB` below one of them, in the format that `below` names."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:{below}} MB"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:  # another process removes or renames it meanwhile
        return 0


def read_json(file: Path, remedy: str = "copy it again") -> dict[str, Any]:
    """A JSON object from a file.

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


def require_space(folder: Path, nbytes: int, what: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: where it will be written; it need not exist yet.
        nbytes: that will be written there, beside what is there already.
        what: that is.

    Raises:
        VesselError: says how much is needed and free, and what helps.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise VesselError(
            f"{folder}: {what} take {readable(nbytes)} and {readable(free)} are free there; make room, put the run on "
            "another disk with hydra.run.dir=FOLDER, or write less: callbacks.checkpoint=null keeps no best one, and a "
            "smaller lora= or trainable=decoder_only makes each smaller"
        )
