"""Folders and files as a user names them."""

from __future__ import annotations

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
