"""Overview of a data set: its statistics and a contact sheet of overlays."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.table import Table

from vessel.data.catalog import Frame, Split
from vessel.data.masks import read_mask

THUMBNAIL = 240
COLUMNS = 6


def statistics(frames: Sequence[Frame], shares: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Compute the statistics of the whole set.

    Args:
        frames: all of them.
        shares: foreground share in [0, 1] by frame id and phrase; an absent phrase has no entry.

    Returns:
        JSON content. Under `phrases`: images with the phrase, images without, the mean share over all images, and
        mean, least and greatest share of the images that have it.
    """
    phrases = {}
    for phrase in frames[0].masks:
        present = [share for of_frame in shares.values() if (share := of_frame.get(phrase)) is not None]
        phrases[phrase] = {
            "present": len(present),
            "absent": len(frames) - len(present),
            "share_of_all": sum(present) / len(frames),
            "share_where_present": {
                "mean": float(np.mean(present)) if present else None,
                "min": min(present, default=None),
                "max": max(present, default=None),
            },
        }
    patients: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for frame in frames:
        patients[frame.patient][frame.video] += 1
    return {
        "images": len(frames),
        "sizes": dict(Counter(f"{frame.width}x{frame.height}" for frame in frames).most_common()),
        "patients": {patient: dict(sorted(videos.items())) for patient, videos in sorted(patients.items())},
        "phrases": phrases,
    }


def tables(figures: Mapping[str, Any], split: Split) -> list[Table]:
    """Lay out the statistics and the split as tables for the terminal."""
    videos = [count for of_patient in figures["patients"].values() for count in of_patient.values()]
    sizes = ", ".join(f"{size} ({count})" for size, count in list(figures["sizes"].items())[:4])
    span = "-".join(map(str, sorted({min(videos), max(videos)})))
    title = (
        f"{figures['images']} images of {len(figures['patients'])} patient(s), {len(videos)} video(s) "
        f"of {span} frames; {sizes}"
    )
    phrases = Table("phrase", "present", "absent", title=title, title_justify="left")
    for heading in ("of all pixels", "where present", "min", "max"):
        phrases.add_column(heading, justify="right")
    for phrase, row in figures["phrases"].items():
        shares = (row["share_of_all"], *row["share_where_present"].values())
        percentages = ("-" if share is None else f"{share:.2%}" for share in shares)
        phrases.add_row(phrase, str(row["present"]), str(row["absent"]), *percentages)
    counts = {name: len(ids) for name, ids in split.parts.items()}
    left_out = figures["images"] - sum(counts.values())
    parts = Table(*counts, "left out", "folds", title=f"split by {split.unit}", title_justify="left")
    parts.add_row(*map(str, counts.values()), str(left_out), str(len(split.folds)))
    return [phrases, parts]


def contact_sheet(root: Path, frames: Sequence[Frame], count: int = 24) -> Image.Image:
    """Draw overlays of some frames, taken evenly from every patient, with a legend of phrases and colours.

    Args:
        root: folder that the paths of the frames are relative to.
        frames: all frames; at least one.
        count: frames to show at most.
    """
    from vessel.plotting.colours import PHRASE_COLOURS

    picked = _spread(frames, count)
    columns = min(COLUMNS, len(picked))
    cell = (THUMBNAIL + 8, THUMBNAIL + 26)
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (max(columns * cell[0], 480), -(-len(picked) // columns) * cell[1] + 34), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    x = 8.0
    for i, phrase in enumerate(frames[0].masks):
        draw.rectangle((x, 9, x + 14, 23), fill=PHRASE_COLOURS[i % len(PHRASE_COLOURS)])
        draw.text((x + 20, 8), phrase, font=font, fill="white")
        x += 44 + draw.textlength(phrase, font=font)
    for index, frame in enumerate(picked):
        left, top = (index % columns) * cell[0] + 4, (index // columns) * cell[1] + 34
        sheet.paste(Image.fromarray(_thumbnail(root, frame)), (left, top))
        draw.text((left, top + THUMBNAIL + 2), frame.id, font=font, fill=(190, 190, 190))
    return sheet


def absence_warnings(frames: Sequence[Frame], split: Split) -> list[str]:
    """Write a warning for each phrase that no image of a part of the split shows."""
    by_id = {frame.id: frame for frame in frames}
    what = {
        "train": "nothing can be learnt about it",
        "val": "its validation scores only count false positives",
        "test": "its test scores only count false positives",
    }
    return [
        f"{phrase} is in none of the {len(ids)} {part} images: {what[part]}"
        for part, ids in split.parts.items()
        for phrase in frames[0].masks
        if ids and all(by_id[frame_id].masks[phrase] is None for frame_id in ids)
    ]


def _thumbnail(root: Path, frame: Frame) -> np.ndarray:
    """Overlay masks on the small image, where an outline of one pixel stays visible: uint8 [h, w, 3]."""
    from vessel.plotting.overlays import overlay

    with Image.open(root / frame.image) as image:
        small = ImageOps.contain(image, (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    masks = np.zeros((len(frame.masks), small.height, small.width), dtype=bool)
    for mask, path in zip(masks, frame.masks.values(), strict=True):
        if path is not None:
            whole = Image.fromarray(read_mask(root / path, (frame.height, frame.width)).astype(np.float32))
            mask[:] = np.array(whole.resize(small.size, Image.Resampling.BOX)) > 0  # the thinnest vessel stays
    return overlay(np.array(small), masks)


def _spread(frames: Sequence[Frame], count: int) -> list[Frame]:
    """Pick up to `count` frames: as far as possible equally many of every patient, evenly over its frames."""
    patients: defaultdict[str, list[Frame]] = defaultdict(list)
    for frame in sorted(frames, key=lambda frame: frame.id):
        patients[frame.patient].append(frame)
    longest = max(map(len, patients.values()))
    turns = [patient for turn in range(longest) for patient, own in patients.items() if turn < len(own)]
    picked = []
    for patient, quota in Counter(turns[:count]).items():
        own = patients[patient]
        picked += [own[i] for i in np.linspace(0, len(own) - 1, quota).round().astype(int)]
    return picked
