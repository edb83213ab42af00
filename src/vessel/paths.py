"""Paths as users write them: expand, quote and shorten."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from vessel.errors import VesselError


def expanded(path: str | Path) -> Path:
    """Expand `~` and `~user` in a path.

    Raises:
        VesselError: there is no user of that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise VesselError(f"{path}: there is no user of that name; write the whole path") from error


def hydra_quoted(path: Path | str) -> str:
    """Quote a path as a value of Hydra's command line."""
    # A backslash stands for itself, but before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(path))
    return f"'{escaped}'"


def hydra_option(key: str, folder: Path) -> str:
    """Write `key=folder` as a user types it into a shell for Hydra; the folder is relative to the current one."""
    path = os.path.relpath(folder)
    plain = re.fullmatch(r"[\w./-]+", path)
    return shlex.quote(f"{key}={path if plain else hydra_quoted(Path(path))}")


def display_path(path: Path) -> str:
    """Return a path as reports name it: relative to the current folder, or the last name of one that lies elsewhere.

    Folders above may be named after people, so they never appear.
    """
    relative = os.path.relpath(path)
    return path.name if relative.startswith(os.pardir) else relative
