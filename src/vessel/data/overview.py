"""What a data set looks like as a whole: its statistics and a contact sheet of overlays."""

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

# Okabe and Ito's colours, which colour-blind readers can tell apart; two of theirs vanish on OCT's sepia.
COLOURS = ((0, 158, 255), (0, 220, 130), (255, 80, 180), (255, 255, 255), (86, 255, 255), (190, 130, 255))
THUMBNAIL = 240
COLUMNS = 6


def statistics(frames: Sequence[Frame], shares: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Figures of the whole set.

    Args:
        frames: all of them.
        shares: foreground share in [0, 1] by frame id and phrase; a phrase is not named where it is absent.

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
    """The statistics and the split, for the terminal."""
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
        shown = ("-" if share is None else f"{share:.2%}" for share in shares)
        phrases.add_row(phrase, str(row["present"]), str(row["absent"]), *shown)
    counts = {name: len(ids) for name, ids in split.parts.items()}
    left_out = figures["images"] - sum(counts.values())
    parts = Table(*counts, "left out", "folds", title=f"split by {split.unit}", title_justify="left")
    parts.add_row(*map(str, counts.values()), str(left_out), str(len(split.folds)))
    return [phrases, parts]


def contact_sheet(root: Path, frames: Sequence[Frame], count: int = 24) -> Image.Image:
    """Overlays of some frames, taken evenly from every patient, with the colour of each phrase.

    Args:
        root: folder that the paths of the frames are relative to.
        frames: all frames; at least one.
        count: frames to show at most.
    """
    shown = _spread(frames, count)
    colours = {phrase: COLOURS[i % len(COLOURS)] for i, phrase in enumerate(frames[0].masks)}
    columns = min(COLUMNS, len(shown))
    cell = (THUMBNAIL + 8, THUMBNAIL + 26)
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (max(columns * cell[0], 480), -(-len(shown) // columns) * cell[1] + 34), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    x = 8.0
    for phrase, colour in colours.items():
        draw.rectangle((x, 9, x + 14, 23), fill=colour)
        draw.text((x + 20, 8), phrase, font=font, fill="white")
        x += 44 + draw.textlength(phrase, font=font)
    for index, frame in enumerate(shown):
        left, top = (index % columns) * cell[0] + 4, (index // columns) * cell[1] + 34
        thumbnail = ImageOps.contain(overlay(root, frame, colours), (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, (left, top))
        draw.text((left, top + THUMBNAIL + 2), frame.id, font=font, fill=(190, 190, 190))
    return sheet


def overlay(root: Path, frame: Frame, colours: Mapping[str, tuple[int, int, int]]) -> Image.Image:
    """The frame with each mask as a translucent colour and a solid outline, wide enough to survive a thumbnail."""
    import cv2

    with Image.open(root / frame.image) as image:
        pixels = np.array(image, dtype=np.float32)
    width = max(3, 2 * round(max(frame.width, frame.height) / THUMBNAIL) + 1)
    for phrase, path in frame.masks.items():
        if path is None:
            continue
        mask = read_mask(root / path, (frame.height, frame.width))
        colour = np.array(colours[phrase], dtype=np.float32)
        pixels[mask] = 0.75 * pixels[mask] + 0.25 * colour
        edge = cv2.dilate(mask.astype(np.uint8), np.ones((width, width), np.uint8)).astype(bool) & ~mask
        pixels[edge] = colour
    return Image.fromarray(pixels.astype(np.uint8))


def _spread(frames: Sequence[Frame], count: int) -> list[Frame]:
    """Up to `count` frames: from every patient the same number as far as possible, evenly over its frames."""
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
