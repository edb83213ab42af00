"""Folders and files as a user names them."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from vessel.errors import VesselError


def expanded(place: str | Path) -> Path:
    """With `~` and `~user` written out.

    Raises:
        VesselError: nobody of that name has a home here.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise VesselError(f"{place}: no user of that name has a home here; write the whole path") from error


def quoted(path: Path | str) -> str:
    """A path as a value of Hydra's command line."""
    # A backslash stands for itself, but before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(path))
    return f"'{escaped}'"


def option(key: str, folder: Path) -> str:
    """`key=folder`, from where we are, as a user types it into a shell for Hydra."""
    place = os.path.relpath(folder)
    plain = re.fullmatch(r"[\w./-]+", place)
    return shlex.quote(f"{key}={place if plain else quoted(Path(place))}")


def named(path: Path) -> str:
    """A place as reports name it: relative to here, or its last name, as folders above may be called after people."""
    relative = os.path.relpath(path)
    return path.name if relative.startswith(os.pardir) else relative
