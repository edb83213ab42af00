"""Inputs of a prediction: image files, named in any of several ways, and phrases."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from vessel.data.catalog import KIND, Catalog
from vessel.data.images import IMAGE_SUFFIXES
from vessel.data.phrases import normal_phrase
from vessel.data.prompt import Prompt
from vessel.errors import VesselError
from vessel.paths import expanded


@dataclass(frozen=True)
class InputImage:
    """An image to be predicted.

    Attributes:
        id: unique; a relative path without suffix, under which results are written.
        file: its path.
        name: its path in reports: relative to the folder that the user named.
    """

    id: str
    file: Path
    name: str


def find_images(images: str, *, split: str | None = None, beside: Path | None = None) -> list[InputImage]:
    """Find the images of a file, a folder with its sub-folders, a glob pattern, or a prepared data set.

    In a folder, hidden files and masks (`*_mask.*`) are passed over.

    Args:
        images: the value of the option `images`.
        split: `train`, `val` or `test` of a prepared data set; None takes all its images.
        beside: folder whose files are no input, because results go there.

    Raises:
        VesselError: nothing there, or no image among it, or a split of something that has none.
    """
    path = expanded(images)
    if _is_data_set(path):
        catalog = Catalog.open(path)
        frames = list(catalog.frames.values()) if split is None else catalog.part(split)
        return [InputImage(frame.id, catalog.root / frame.image, frame.image) for frame in frames]
    if split is not None:
        raise VesselError(f"split={split}: images={images} is no prepared data set; leave split= away")
    if path.is_file():
        return _input_images([path], path.parent)
    if path.is_dir():
        base, found = path, path.rglob("*")
    elif glob.has_magic(str(path)):
        base, found = _fixed_part(path), (Path(file) for file in glob.glob(str(path), recursive=True))
    else:
        raise VesselError(f"images={images}: no such file or folder")
    files = sorted(file for file in found if _is_image(file.relative_to(base), file, beside))
    if not files:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise VesselError(f"images={images}: no image there; files of these kinds are read: {known}")
    return _input_images(files, base)


def requested_phrases(phrases: str | Sequence[str] | None, known: Sequence[str], prompt: Prompt) -> tuple[str, ...]:
    """Return the phrases to segment, normalised, each once.

    Args:
        phrases: one phrase, several, or None for those the network was trained on.
        known: the phrases that the network was trained on.
        prompt: whose special tokens no phrase may hold.

    Raises:
        VesselError: none, an empty one, or one that holds `<image>`, `[SEG]` or another token that is not words.
    """
    if phrases is None:
        return tuple(known)
    listed = [phrases] if isinstance(phrases, str) else list(phrases)
    reserved = {"<image>", *(token.lower() for token in prompt.tokenizer.get_added_vocab())}
    for phrase in listed:
        if held := sorted(token for token in reserved if token in phrase.lower()):
            raise VesselError(
                f"phrases: {phrase!r} holds {', '.join(held)}; name the thing alone, such as 'blood vessel'. "
                "vessel puts the image and [SEG] where they belong"
            )
        if not any(letter.isalnum() for letter in phrase):
            raise VesselError(f"phrases: {phrase!r} names nothing; give words, such as 'blood vessel'")
    if not listed:
        raise VesselError("phrases=[]: give one phrase at least, or leave it away for those of the run")
    return tuple(dict.fromkeys(map(normal_phrase, listed)))


def _is_data_set(path: Path) -> bool:
    manifest = path / "manifest.json"
    return manifest.is_file() and KIND in manifest.read_text(encoding="utf-8", errors="replace")[:1000]


def _is_image(relative: PurePath, file: Path, beside: Path | None) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    is_result = beside is not None and file.resolve().is_relative_to(beside.resolve())
    kind = file.suffix.lower() in IMAGE_SUFFIXES and not file.stem.endswith("_mask")
    return kind and not hidden and not is_result and file.is_file()


def _fixed_part(pattern: Path) -> Path:
    """Return the folder before the first wildcard of a glob pattern."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _input_images(files: Iterable[Path], base: Path) -> list[InputImage]:
    """Name the files as input images; those that differ in suffix only keep it in their id."""
    names = [file.relative_to(base) for file in files]
    stems = Counter(name.with_suffix("").as_posix() for name in names)
    images: dict[str, InputImage] = {}
    for name in names:
        stem = name.with_suffix("").as_posix()
        unique = stem if stems[stem] == 1 else name.as_posix()
        while unique in images:
            unique += "_"
        images[unique] = InputImage(unique, base / name, name.as_posix())
    return list(images.values())
