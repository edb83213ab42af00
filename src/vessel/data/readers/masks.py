"""Layout `masks`: one PNG mask an image, in masks/ or beside the images."""

from __future__ import annotations

from pathlib import Path

from vessel.data.phrases import normal_phrase
from vessel.data.readers.layout import Labels, SourceLayout, SourcePaths, image_key, list_files
from vessel.errors import Problem

MASK_SUFFIX = "_mask"  # ends the stem of a mask


def find_masks(paths: SourcePaths) -> list[Path]:
    """List the mask files in masks/ and beside the images."""
    beside = [p for p in list_files(paths.images, ".png") if p.stem.endswith(MASK_SUFFIX)]
    return [*list_files(paths.folder / "masks", ".png"), *beside]


def read_masks(files: list[Path], phrase: str) -> tuple[Labels, list[Problem]]:
    """Assign mask files of one phrase to images by their stems."""
    labels: Labels = {}
    problems = []
    for file in files:
        key = image_key(file.stem.removesuffix(MASK_SUFFIX))
        if key in labels:
            problems.append(Problem(str(file), "a second mask of the same image and phrase", "keep one of them"))
        labels[key] = {phrase: file}
    return labels, problems


def _is_present(paths: SourcePaths) -> bool:
    return bool(find_masks(paths))


def _read(paths: SourcePaths, phrase: str) -> tuple[Labels, list[Problem]]:
    return read_masks(find_masks(paths), normal_phrase(phrase))


LAYOUT = SourceLayout("<stem>_mask.png in masks/ or beside each image", _is_present, _read)
