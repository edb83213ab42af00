"""Write the files of a prepared data set: one frame at a time, then the records of all frames."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vessel.data.catalog import KIND, VERSION, Frame, Split, digest, fingerprint_of, slug
from vessel.data.identity import Identity
from vessel.data.images import pixel_hash, read_rgb
from vessel.data.masks import mask_polygons, rasterise, read_mask, write_mask
from vessel.data.overview import absence_warnings, contact_sheet, statistics
from vessel.data.readers.layout import Label
from vessel.data.readers.polygons import fit_polygons
from vessel.data.readers.source import Item
from vessel.errors import Problem, VesselError


@dataclass(frozen=True)
class Job:
    """One source image to be written as a frame.

    Attributes:
        item: the source image with its labels.
        identity: the name it gets.
        phrases: every phrase of the data set.
        root: folder of the data set that is being made.
        depth: bits of the 16-bit grey images of the source; None when it has none.
    """

    item: Item
    identity: Identity
    phrases: tuple[str, ...]
    root: Path
    depth: int | None


@dataclass(frozen=True)
class Written:
    """A frame on disk.

    Attributes:
        frame: its record.
        shares: foreground share in [0, 1] of each phrase that is present.
        masks_hash: of the pixels of its masks.
        annotation: its entry in annotations.json.
    """

    frame: Frame
    shares: Mapping[str, float]
    masks_hash: str
    annotation: Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """Facts of a data set apart from its frames.

    Attributes:
        name: what reports call the data set.
        source_fingerprint: equal in a later run if nothing has changed.
        depth: bits that the 16-bit grey images of the source were scaled from; None when it has none.
        pixel_spacing: millimetres per pixel along rows and along columns, of every image; None when unknown.
    """

    name: str
    source_fingerprint: str
    depth: int | None
    pixel_spacing: tuple[float, float] | None


def spacing_of(option: Any) -> tuple[float, float] | None:
    """Parse the option `pixel_spacing` into (row, column); one number means square pixels.

    Raises:
        VesselError: it is neither null nor one or two positive, finite numbers.
    """
    if option is None:
        return None
    values = option if isinstance(option, list | tuple) else [option, option]
    if len(values) != 2 or not all(type(value) in (int, float) and 0 < value < math.inf for value in values):
        raise VesselError(
            f"pixel_spacing={option}: give the millimetres of a pixel, such as 0.01 or [row,column], or null if unknown"
        )
    return float(values[0]), float(values[1])


def write_frame(job: Job) -> Written | list[Problem]:
    """Decode one source image and its labels and write image and masks; return the problems if there are any."""
    try:
        image = read_rgb(job.item.image, depth=job.depth)
    except VesselError as error:
        return [error.args[0]]
    size = (image.shape[0], image.shape[1])
    masks, problems = _masks(job.item.labels, size)
    if problems:
        return problems
    name = f"{job.identity.id}.png"
    # From the array, so that no EXIF or text chunk of the source comes along.
    Image.fromarray(image).save(job.root / "images" / name)
    for phrase, mask in masks.items():
        write_mask(job.root / "masks" / slug(phrase) / name, mask)
    frame = Frame(
        id=job.identity.id,
        image=f"images/{name}",
        width=size[1],
        height=size[0],
        patient=job.identity.patient,
        video=job.identity.video,
        frame=job.identity.frame,
        masks={p: f"masks/{slug(p)}/{name}" if p in masks else None for p in job.phrases},
        sha256=pixel_hash(image),
    )
    return Written(
        frame=frame,
        shares={phrase: float(mask.mean()) for phrase, mask in masks.items()},
        masks_hash=digest({p: hashlib.sha256(np.packbits(mask).tobytes()).hexdigest() for p, mask in masks.items()}),
        annotation={
            "image": name,
            "width": size[1],
            "height": size[0],
            "mask": [mask_polygons(mask) for mask in masks.values()],
            "text": list(masks),
        },
    )


def _masks(labels: Mapping[str, Label], size: tuple[int, int]) -> tuple[dict[str, np.ndarray], list[Problem]]:
    masks, problems = {}, []
    for phrase, label in labels.items():
        try:
            mask = _mask(label, size)
        except VesselError as error:
            problems.append(error.args[0])
            continue
        if mask.any():  # a black mask file declares the phrase absent
            masks[phrase] = mask
    return masks, problems


def _mask(label: Label, size: tuple[int, int]) -> np.ndarray:
    if isinstance(label, Path):
        return read_mask(label, size)
    mask = rasterise(fit_polygons(label, size), size)
    if label and not mask.any():
        raise VesselError(Problem(label[0].where, "covers no pixel", "draw it larger, or delete it"))
    return mask


def make_folders(root: Path, phrases: Sequence[str]) -> None:
    """Create the empty tree that `write_frame` writes into."""
    (root / "images").mkdir(parents=True)
    for phrase in phrases:
        (root / "masks" / slug(phrase)).mkdir(parents=True)


def write_summary(root: Path, written: Sequence[Written], split: Split, *, origin: Origin) -> None:
    """Write the files about all frames: records, split, annotations, statistics, contact sheet, manifest.

    Args:
        root: the data set that is being made, its images and masks written.
        written: all frames, sorted by id.
        split: of these frames.
        origin: further facts for the manifest.
    """
    frames = [each.frame for each in written]
    masks_hash = digest([each.masks_hash for each in written])
    figures = statistics(frames, {each.frame.id: each.shares for each in written})
    manifest = {
        "kind": KIND,
        "version": VERSION,
        "name": origin.name,
        "fingerprint": fingerprint_of(frames, masks_hash, origin.pixel_spacing),
        "masks_hash": masks_hash,
        "split_hash": split.hash,
        "source_fingerprint": origin.source_fingerprint,
        "unit": split.unit,
        "note": split.note,
        "phrases": list(frames[0].masks),
        "n_images": len(frames),
        "n_patients": len(figures["patients"]),
        "n_videos": sum(map(len, figures["patients"].values())),
        "pixel_spacing": origin.pixel_spacing,
        "grey_bits": origin.depth,
        "warnings": absence_warnings(frames, split),
        "statistics": figures,
    }
    _write_json(root / "frames.json", [asdict(frame) for frame in frames])
    _write_json(root / "splits.json", split.to_json())
    _write_json(root / "annotations.json", [each.annotation for each in written], indent=None)
    _write_json(root / "statistics.json", figures)
    _write_json(root / "manifest.json", manifest)
    contact_sheet(root, frames).save(root / "contact_sheet.png")


def _write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, indent=indent, separators=separators, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
