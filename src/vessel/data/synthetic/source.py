"""Synthetic sources: raw folders as a hospital would deliver them, for `vessel.prepare` to read.

Two kinds: "oct", intravascular-OCT pullbacks with the phrases "lumen", "side branch" and "lipid core", and "tree",
X-ray angiography runs with the phrase "blood vessel". Names and ids are invented.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vessel.data.synthetic import anatomy, angiography, oct
from vessel.errors import VesselError
from vessel.files import write_folder

RenderedFrame = tuple[NDArray[np.uint8], dict[str, NDArray[np.bool_]]]

KINDS = ("oct", "tree")
# Initials differ, so that patients known by their initials stay apart.
GIVEN = ("Arvo", "Belis", "Cendra", "Dovik", "Ezmo", "Fenja", "Gorlan", "Hesk", "Ilvar", "Jorin", "Kelda", "Lurik")
FAMILY = (
    "Amberfold",
    "Brackwater",
    "Copperlane",
    "Dunmarrow",
    "Eastfield",
    "Fernhollow",
    "Greyloch",
    "Hazelwick",
    "Ironbrook",
    "Jackdawe",
)
# One row a patient, in turn; two spellings are two videos. D has no id to join it with another
# spelling, so it stands alone.
SPELLINGS = (("A", "B"), ("C caret",), ("D name",), ("B", "C underscores"), ("A",), ("D initials",))


def write_source(
    folder: Path, *, kind: str = "oct", patients: int = 8, frames: int = 24, size: int = 256, seed: int = 0
) -> None:
    """Write a raw source folder of images and of masks, one folder a phrase.

    Images are `images/<video>_frame_<6 digits>.<png|jpg>`; masks are 1-bit `masks/<phrase>/<stem>_mask.png`, only
    where the phrase is present. The same arguments give the same pixels. Neighbouring frames are near duplicates.

    Args:
        folder: where to write; must not exist or be empty. It appears complete or not at all.
        kind: "oct" (RGB, PNG) or "tree" (grey, JPEG of quality 95).
        patients: number of patients, 1 to 120; some have two videos, under two spellings of their name.
        frames: frames of each patient, over all videos.
        size: side of a frame in pixels, at least 64.
        seed: another seed makes other patients.

    Raises:
        VesselError: when an argument is out of range or the folder holds something.
    """
    most = len(GIVEN) * len(FAMILY)
    if kind not in KINDS:
        raise VesselError(f"synthetic kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if not 1 <= patients <= most or frames < 1 or size < 64 or seed < 0:
        raise VesselError(
            f"synthetic data cannot have patients={patients}, frames={frames}, size={size}, seed={seed}; "
            f"use 1 to {most} patients, at least 1 frame, a size of 64 or more and a seed of 0 or more"
        )
    with write_folder(folder) as part:
        (part / "images").mkdir()
        for patient in range(patients):
            names = _video_names(patient, seed)[:frames]
            second = max(1, frames // 3)
            counts = (frames,) if len(names) == 1 else (frames - second, second)
            for video, (name, count) in enumerate(zip(names, counts, strict=True)):
                for number, (image, masks) in _video(kind, count, size, seed, (patient, video)):
                    _write_frame(part, f"{name}_frame_{number:06d}", image, masks)


def _rng(seed: int, *key: int) -> np.random.Generator:
    """Make the generator of a patient, a video (patient, video) or a frame (patient, video, frame)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _video(kind: str, count: int, size: int, seed: int, key: tuple[int, int]) -> Iterator[tuple[int, RenderedFrame]]:
    """Yield the frame numbers of a video with their frames."""
    rng = _rng(seed, *key)
    numbers = np.cumsum(rng.integers(1, 4, count)) - 1
    length = int(numbers[-1])
    if kind == "oct":
        render = partial(oct.render, anatomy.draw_pullback(rng, length))
    else:
        render = partial(angiography.render, angiography.draw_run(rng, length))
    for frame, number in enumerate(numbers.tolist()):
        yield number, render(number, size, _rng(seed, *key, frame))


def _video_names(patient: int, seed: int) -> list[str]:
    """Make the names of a patient's videos in the spellings of the home set (A, B, C twice, D twice)."""
    rng = _rng(seed, patient)
    index = (patient + 7 * seed) % (len(GIVEN) * len(FAMILY))
    # 12 and 10 share a factor: the quotient is added so that no two patients meet in one name.
    given, family = GIVEN[index % len(GIVEN)], FAMILY[(index + index // len(GIVEN)) % len(FAMILY)]
    spaced, joined, hospital_id = f"{given} {family}", f"{given}_{family}", f"9{rng.integers(10**6):06d}{patient:03d}"
    names = []
    for spelling in SPELLINGS[patient % len(SPELLINGS)]:
        series = f"{rng.integers(1, 10)}-{rng.integers(1, 5)}_{rng.integers(1, 60)}_{rng.integers(2**32):08x}"
        names.append(
            {
                "A": f"{spaced}({hospital_id})_{series}",
                "B": f"{joined}_{hospital_id}__{series}",
                "C caret": f"{spaced}^({hospital_id})_{series}",
                "C underscores": f"{joined}__{hospital_id}__{series}",
                "D name": spaced.lower(),
                "D initials": f"{given[0]}_{family[0]}".lower(),
            }[spelling]
        )
    return names


def _write_frame(folder: Path, stem: str, image: NDArray[np.uint8], masks: dict[str, NDArray[np.bool_]]) -> None:
    if image.ndim == 2:
        Image.fromarray(image).save(folder / "images" / f"{stem}.jpg", quality=95)
    else:
        Image.fromarray(image).save(folder / "images" / f"{stem}.png")
    for phrase, mask in masks.items():
        mask_folder = folder / "masks" / phrase.replace(" ", "_")
        mask_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(mask_folder / f"{stem}_mask.png")
