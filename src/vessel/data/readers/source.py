"""Source folders: find their images and the label of each phrase. Nothing is decoded here.

A new layout is one module with a `LAYOUT`, and one line in `SOURCE_LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vessel.data.images import IMAGE_SUFFIXES
from vessel.data.readers import labelme, masks, phrases, sa2va
from vessel.data.readers.layout import Label, Labels, SourcePaths, image_key, list_files
from vessel.data.readers.masks import MASK_SUFFIX, find_masks
from vessel.errors import BadItemsError, Problem, VesselError

SOURCE_LAYOUTS = {
    "masks": masks.LAYOUT,
    "phrases": phrases.LAYOUT,
    "labelme": labelme.LAYOUT,
    "annotations": sa2va.LAYOUT,
}


@dataclass(frozen=True)
class Item:
    """A source image with its labels.

    Attributes:
        image: the image file.
        labels: a mask file or polygons by phrase; every other phrase of the source is declared absent.
    """

    image: Path
    labels: Mapping[str, Label]


@dataclass
class SourceFolder:
    """The images of a source folder, with their labels.

    Attributes:
        items: images in the order of their file names.
        phrases: every phrase, sorted.
        problems: what must be fixed before anything is written.
    """

    items: list[Item] = field(default_factory=list)
    phrases: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)


def read_source(
    folder: Path, *, layout: str = "auto", phrase: str = "blood vessel", missing: str = "error"
) -> SourceFolder:
    """Find the images of a folder and pair them with their labels.

    Args:
        folder: images in `images/` or directly inside, labels in one of `SOURCE_LAYOUTS`.
        layout: a key of `SOURCE_LAYOUTS`, or `auto` to recognise it by content.
        phrase: of the masks of the layout `masks`, whose files name none.
        missing: `error` makes an image without annotation a problem, `empty` declares every phrase absent on it.

    Raises:
        VesselError: when the folder holds no images, no labels, or labels of several layouts with `layout=auto`.
    """
    paths = SourcePaths(folder, folder / "images" if (folder / "images").is_dir() else folder)
    images = [p for p in list_files(paths.images, *IMAGE_SUFFIXES) if not p.stem.endswith(MASK_SUFFIX)]
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        count = len(find_masks(paths))
        found = f"{count} masks but no images" if count else "no images"
        raise VesselError(f"{folder}: {found}; searched for {suffixes} in it and in its folder images/")
    chosen = SOURCE_LAYOUTS[detect_layout(paths) if layout == "auto" else layout]
    labels, problems = chosen.read(paths, phrase)
    return _pair(images, labels, problems, missing_is_empty=missing == "empty", expected=chosen.summary)


def detect_layout(paths: SourcePaths) -> str:
    """Recognise the one layout whose labels the folder holds, and return its key in `SOURCE_LAYOUTS`.

    Raises:
        VesselError: when there is none or more than one, or the folder is a prepared data set already.
    """
    folder = paths.folder
    if (folder / "manifest.json").is_file() and (folder / "splits.json").is_file():
        raise VesselError(f"{folder} is a prepared data set already; use it as it is: data.root={folder}")
    present = [name for name, layout in SOURCE_LAYOUTS.items() if layout.is_present(paths)]
    if len(present) == 1:
        return present[0]
    listed = "\n".join(f"  layout={name}: {SOURCE_LAYOUTS[name].summary}" for name in (present or SOURCE_LAYOUTS))
    if not present:
        raise VesselError(f"{folder}: images but no annotations; searched for\n{listed}")
    raise VesselError(f"{folder}: annotations of {len(present)} kinds; choose one (PNG masks lose nothing):\n{listed}")


def _pair(
    images: list[Path],
    labels: Labels,
    problems: list[Problem],
    *,
    missing_is_empty: bool,
    expected: str,
) -> SourceFolder:
    source = SourceFolder(problems=list(problems))
    by_key: dict[str, Path] = {}
    for image in images:
        key = image_key(image.stem)
        if key in by_key:
            reason = f"has the same stem as {by_key[key].name}"
            source.problems.append(Problem(str(image), reason, "rename or remove one"))
        by_key[key] = image
        if key not in labels and not missing_is_empty:
            remedy = f"expected {expected}; annotate it, remove it, or declare such images empty with missing=empty"
            source.problems.append(Problem(str(image), "has no annotation", remedy))
        source.items.append(Item(image, labels.get(key, {})))
    for orphan in sorted(labels.keys() - by_key.keys()):
        source.problems.append(
            Problem(orphan, "is annotated but there is no such image", "add the image or remove this")
        )
    source.phrases = tuple(sorted({phrase for item in source.items for phrase in item.labels}))
    if "all" in source.phrases:
        remedy = "name the structure that the masks show"
        source.problems.append(Problem("phrase 'all'", "is the name of the mean over phrases in reports", remedy))
    if not source.phrases and not source.problems:
        raise BadItemsError(
            "annotations", [Problem("all images", "no phrase is annotated anywhere", f"expected {expected}")]
        )
    return source
