"""The interface of a reader of a source layout: it takes the files of a folder and returns labels by image."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vessel.data.readers.polygons import Polygon
from vessel.errors import Problem

Label = Path | tuple[Polygon, ...]  # a mask file, or polygons; no polygon declares the phrase absent
Labels = dict[str, dict[str, Label]]  # key of an image (`image_key`) -> phrase -> label


@dataclass(frozen=True)
class SourcePaths:
    """Paths of a source folder.

    Attributes:
        folder: the source folder.
        images: folder of its images: `images/` in it, or itself.
    """

    folder: Path
    images: Path


@dataclass(frozen=True)
class SourceLayout:
    """A way in which labels lie in a source folder.

    Attributes:
        summary: where the labels lie, for messages.
        is_present: returns whether a folder holds such labels.
        read: reads labels by image, and lists what could not be read; its second argument is the phrase of masks whose
            files name none.
    """

    summary: str
    is_present: Callable[[SourcePaths], bool]
    read: Callable[[SourcePaths, str], tuple[Labels, list[Problem]]]


def image_key(stem: str) -> str:
    """Return a stem in the form in which stems are compared: some systems store `é` in two code points."""
    return unicodedata.normalize("NFC", stem)


def list_files(folder: Path, *suffixes: str) -> list[Path]:
    """List the visible files of a folder with one of `suffixes` (lower case), sorted; none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.name[0] != "." and p.is_file())


def list_folders(folder: Path) -> list[Path]:
    """List the visible folders in a folder, sorted; none where it does not exist."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
