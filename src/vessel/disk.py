"""What files take, and how it is said."""

from __future__ import annotations

from pathlib import Path


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
