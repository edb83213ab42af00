"""Free questions about an image, and the regions of the image that they refer to."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vessel.batch import InputGeometry, Sample
from vessel.data.masks import read_mask
from vessel.data.prompt import PLACEHOLDER, Prompt
from vessel.data.transforms import cut_tiles, whole_frame
from vessel.errors import Problem, VesselError


def check_question(question: str, prompt: Prompt) -> None:
    """Refuse a question that is empty or holds special tokens.

    Raises:
        VesselError: it is empty, or holds `[SEG]` or another special token; only `<image>` may occur, once.
    """
    if special := sorted(token for token in prompt.tokenizer.get_added_vocab() if token in question):
        raise VesselError(
            f"question={question!r} holds {', '.join(special)}; use plain words, vessel adds what the network needs"
        )
    if not any(letter.isalnum() for letter in question.replace(PLACEHOLDER, "")):
        raise VesselError(f"question={question!r} holds no word; write a question")
    prompt.conversation([question], [], 1)


def question_sample(
    image: NDArray[np.uint8], question: str, prompt: Prompt, geometry: InputGeometry, *, regions: Tensor | None = None
) -> Sample:
    """Make a sample that ends where the answer begins; it has no phrases yet.

    Args:
        image: uint8 [H, W, 3], RGB.
        question: the user's question.
        prompt: of the network that the sample is for.
        geometry: of the same network.
        regions: bool [R, s, s], the regions that the question refers to.
    """
    tiles = cut_tiles(image, geometry)
    counts = [] if regions is None else regions.flatten(1).sum(1).tolist()
    ids, labels = prompt.conversation([question], [], len(tiles) * geometry.tokens_per_tile, regions=counts)
    height, width = image.shape[:2]
    return Sample(
        id="", patient="", video="", phrases=(), tiles=tiles, frame=whole_frame(image, geometry), input_ids=ids,
        labels=labels, size=(height, width), regions=regions,
    )  # fmt: skip


def read_regions(folder: Path, image: str, size: tuple[int, int], geometry: InputGeometry) -> Tensor:
    """Read the regions of an image: masks `a/b_1.png`, `a/b_2.png`, … of the folder for the image `a/b.jpg`.

    Args:
        folder: of the masks.
        image: name of the image file, relative to the folder that the images are in.
        size: (H, W) of the image.
        geometry: of the network.

    Returns:
        bool [R, s, s] on the s x s features of a tile: the nearest pixels of the masks, as the public code takes them.

    Raises:
        VesselError: there is no region, or one is unreadable, of another size or vanishes at this resolution.
    """
    stem, side = folder / Path(image).with_suffix(""), math.isqrt(geometry.tokens_per_tile)
    files: list[Path] = []
    while (file := stem.with_name(f"{stem.name}_{len(files) + 1}.png")).is_file():
        files.append(file)
    if not files:
        raise VesselError(Problem(_name(file, folder), "no such mask", "draw the first region of the image there"))
    try:
        masks = torch.from_numpy(np.stack([read_mask(file, size) for file in files]))
    except VesselError as error:
        raise VesselError(str(error).replace(str(folder), "mask_prompts")) from error
    regions = F.interpolate(masks[None].float(), (side, side), mode="nearest")[0].bool()
    for file, region in zip(files, regions, strict=True):
        if not region.any():
            reason = f"nothing is left of it on the {side} x {side} features of an image"
            raise VesselError(Problem(_name(file, folder), reason, "draw a larger region"))
    return regions


def _name(file: Path, folder: Path) -> str:
    # Folders of this machine are no business of a report.
    return f"mask_prompts{os.sep}{file.relative_to(folder)}"
