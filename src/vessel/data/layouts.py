"""Source folders: which images they hold and where the label of each phrase is. Nothing is decoded here."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vessel.data.annotations import Drawn, Polygon, normal_phrase, read_labelme, read_sa2va
from vessel.data.images import IMAGE_SUFFIXES
from vessel.errors import BadItemsError, Problem, VesselError

SOURCE_LAYOUTS = {
    "masks": "<stem>_mask.png in masks/ or beside each image",
    "phrases": "masks/<phrase>/<stem>_mask.png, one folder per phrase",
    "labelme": "LabelMe files <stem>.json in json/ or beside each image",
    "annotations": "annotations.json in the Sa2VA form",
}
Label = Path | tuple[Polygon, ...]


@dataclass(frozen=True)
class Item:
    """One source image and what is annotated on it.

    Attributes:
        image: the image file.
        labels: a mask file or polygons by phrase; every other phrase of the source is declared absent.
    """

    image: Path
    labels: Mapping[str, Label]


@dataclass
class SourceFolder:
    """All that a source folder holds.

    Attributes:
        items: images in the order of their file names.
        phrases: every phrase, sorted.
        problems: what must be mended before anything is written.
    """

    items: list[Item] = field(default_factory=list)
    phrases: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)


def read_source(
    folder: Path, *, layout: str = "auto", phrase: str = "blood vessel", missing: str = "error"
) -> SourceFolder:
    """Find the images of a folder and pair them with their labels.

    Args:
        folder: images in `images/` or directly inside, labels in one of `LAYOUTS`.
        layout: a key of `LAYOUTS`, or `auto` to recognise it by content.
        phrase: what the masks of the layout `masks` show, which names no phrase itself.
        missing: `error` makes an image without annotation a problem, `empty` declares every phrase absent on it.

    Raises:
        VesselError: when the folder holds no images, no labels, or labels of several layouts with `layout=auto`.
    """
    images_dir = folder / "images" if (folder / "images").is_dir() else folder
    images = [p for p in _files(images_dir, *IMAGE_SUFFIXES) if not p.stem.endswith("_mask")]
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        masks = [*_mask_files(images_dir), *_files(folder / "masks", ".png")]
        found = f"{len(masks)} masks but no images" if masks else "no images"
        raise VesselError(f"{folder}: {found}; looked for {suffixes} in it and in its folder images/")
    chosen = detect_layout(folder, images_dir) if layout == "auto" else layout
    readers: dict[str, Callable[[], tuple[dict[str, dict[str, Label]], list[Problem]]]] = {
        "masks": lambda: _read_masks(
            [*_files(folder / "masks", ".png"), *_mask_files(images_dir)], normal_phrase(phrase)
        ),
        "phrases": lambda: _read_phrase_folders(folder / "masks"),
        "labelme": lambda: _read_labelme_files(folder, images_dir),
        "annotations": lambda: _read_annotations_file(folder / "annotations.json"),
    }
    labels, problems = readers[chosen]()
    return _pair(images, labels, problems, missing_is_empty=missing == "empty", expected=SOURCE_LAYOUTS[chosen])


def detect_layout(folder: Path, images_dir: Path) -> str:
    """The one layout whose labels the folder holds.

    Raises:
        VesselError: when there is none or more than one, or the folder is a prepared data set already.
    """
    if (folder / "manifest.json").is_file() and (folder / "splits.json").is_file():
        raise VesselError(f"{folder} is a prepared data set already; use it as it is: data.root={folder}")
    masks = folder / "masks"
    found = {
        "masks": bool(_files(masks, ".png") or _mask_files(images_dir)),
        "phrases": any(_files(sub, ".png") for sub in _folders(masks)),
        "labelme": any(_is_labelme(file) for file in _labelme_files(folder, images_dir)[:1]),
        "annotations": (folder / "annotations.json").is_file(),
    }
    present = [name for name, here in found.items() if here]
    if len(present) == 1:
        return present[0]
    listed = "\n".join(f"  layout={name}: {SOURCE_LAYOUTS[name]}" for name in (present or SOURCE_LAYOUTS))
    if not present:
        raise VesselError(f"{folder}: images but no annotations; looked for\n{listed}")
    raise VesselError(f"{folder}: annotations of {len(present)} kinds; choose one (PNG masks lose nothing):\n{listed}")


def _files(folder: Path, *suffixes: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.name[0] != "." and p.is_file())


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []


def _mask_files(images_dir: Path) -> list[Path]:
    return [p for p in _files(images_dir, ".png") if p.stem.endswith("_mask")]


def _labelme_files(folder: Path, images_dir: Path) -> list[Path]:
    beside = [p for p in _files(images_dir, ".json") if p.name != "annotations.json"]
    return _files(folder / "json", ".json") or beside


def _is_labelme(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return True  # a broken file is listed with the other bad items rather than overlooked
    return isinstance(content, dict) and "shapes" in content


def _key(stem: str) -> str:
    """A stem as it is compared: some systems store `é` in two code points."""
    return unicodedata.normalize("NFC", stem)


def _read_masks(files: list[Path], phrase: str) -> tuple[dict[str, dict[str, Label]], list[Problem]]:
    labels: dict[str, dict[str, Label]] = {}
    problems = []
    for file in files:
        key = _key(file.stem.removesuffix("_mask"))
        if key in labels:
            problems.append(Problem(str(file), "a second mask of the same image and phrase", "keep one of them"))
        labels[key] = {phrase: file}
    return labels, problems


def _read_phrase_folders(masks: Path) -> tuple[dict[str, dict[str, Label]], list[Problem]]:
    labels: dict[str, dict[str, Label]] = {}
    problems: list[Problem] = []
    phrases: set[str] = set()
    for folder in _folders(masks):
        phrase = normal_phrase(folder.name)
        if phrase in phrases or not phrase:
            problems.append(Problem(str(folder), f"a second folder of the phrase {phrase!r}", "merge or rename one"))
        phrases.add(phrase)
        of_phrase, bad = _read_masks(_files(folder, ".png"), phrase)
        problems += bad
        for key, label in of_phrase.items():
            labels.setdefault(key, {}).update(label)
    return labels, problems


def _read_labelme_files(folder: Path, images_dir: Path) -> tuple[dict[str, dict[str, Label]], list[Problem]]:
    labels: dict[str, dict[str, Label]] = {}
    problems = []
    for file in _labelme_files(folder, images_dir):
        try:
            labels[_key(file.stem)] = dict(read_labelme(file))
        except VesselError as error:
            labels[_key(file.stem)] = {}
            problems.append(error.args[0])
    return labels, problems


def _read_annotations_file(file: Path) -> tuple[dict[str, dict[str, Label]], list[Problem]]:
    by_image: dict[str, Drawn]
    by_image, problems = read_sa2va(file)
    return {_key(Path(name).stem): dict(drawn) for name, drawn in by_image.items()}, problems


def _pair(
    images: list[Path],
    labels: dict[str, dict[str, Label]],
    problems: list[Problem],
    *,
    missing_is_empty: bool,
    expected: str,
) -> SourceFolder:
    source = SourceFolder(problems=list(problems))
    seen: dict[str, Path] = {}
    for image in images:
        key = _key(image.stem)
        if key in seen:
            reason = f"has the same stem as {seen[key].name}"
            source.problems.append(Problem(str(image), reason, "rename or remove one"))
        seen[key] = image
        if key not in labels and not missing_is_empty:
            remedy = f"expected {expected}; annotate it, remove it, or declare such images empty with missing=empty"
            source.problems.append(Problem(str(image), "has no annotation", remedy))
        source.items.append(Item(image, labels.get(key, {})))
    for orphan in sorted(labels.keys() - seen.keys()):
        source.problems.append(
            Problem(orphan, "is annotated but there is no such image", "add the image or remove this")
        )
    source.phrases = tuple(sorted({phrase for item in source.items for phrase in item.labels}))
    if "all" in source.phrases:
        remedy = "name the structure that the masks show"
        source.problems.append(Problem("phrase 'all'", "is what reports call the mean over phrases", remedy))
    if not source.phrases and not source.problems:
        raise BadItemsError(
            "annotations", [Problem("all images", "no phrase is annotated anywhere", f"expected {expected}")]
        )
    return source
