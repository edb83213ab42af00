"""Samples: one image with its phrases, read, augmented, cut and worded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from vessel.batch import Sample, Views
from vessel.data.catalog import Frame
from vessel.data.images import pixel_hash, read_rgb
from vessel.data.masks import read_mask
from vessel.data.prompt import Prompt
from vessel.data.transforms import Augmentation, cut_tiles, whole_frame
from vessel.errors import VesselError


def make_sample(
    image: NDArray[np.uint8], phrases: Sequence[str], prompt: Prompt, views: Views, *, draw: Random | None = None
) -> Sample:
    """A sample without truth: what prediction shows the network.

    Args:
        image: uint8 [H, W, 3], RGB.
        phrases: what to segment, at least one.
        prompt: wording that belongs to the network.
        views: cutting that belongs to the network.
        draw: source of the wordings in training.
    """
    tiles = cut_tiles(image, views)
    ids, labels = prompt.encode(phrases, len(tiles) * views.tokens_per_tile, draw=draw)
    height, width = image.shape[:2]
    return Sample(
        id="", patient="", video="", phrases=tuple(phrases), tiles=tiles, frame=whole_frame(image, views),
        input_ids=ids, labels=labels, size=(height, width),
    )  # fmt: skip


class VesselDataset(Dataset[Sample]):
    """Frames of a prepared data set; every phrase is asked of every frame, absent ones with an empty mask.

    An index may run past the number of frames: `epoch * len + position` gives the frame at `position` with the
    wording and augmentation of that epoch, whichever process loads it.

    Args:
        root: folder of the prepared data set.
        frames: the part to serve.
        phrases: K phrases, normalised.
        prompt, views: wording and cutting that belong to the network.
        augmentation: None outside training.
        seed: of wordings and augmentation.
    """

    def __init__(
        self,
        root: Path,
        frames: Sequence[Frame],
        *,
        phrases: Sequence[str],
        prompt: Prompt,
        views: Views,
        augmentation: Augmentation | None = None,
        varied: bool = False,
        seed: int = 0,
    ) -> None:
        self.root, self.frames, self.phrases = root, list(frames), tuple(phrases)
        self.prompt, self.views = prompt, views
        self.augmentation, self.varied, self.seed = augmentation, varied, seed

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Sample:
        """The sample of `index`, see the class."""
        frame = self.frames[index % len(self)]
        image = read_rgb(self.root / frame.image)
        if pixel_hash(image) != frame.sha256:
            told = "is not the image that was prepared; copy the data set again, or prepare it anew"
            raise VesselError(f"{self.root / frame.image} {told}")
        masks = self._masks(frame)
        if self.augmentation is not None:
            image, masks = self.augmentation(image, masks, seed=self.seed * 1_000_003 + index)
        draw = Random(f"{self.seed} {index}") if self.varied else None
        sample = make_sample(image, self.phrases, self.prompt, self.views, draw=draw)
        return replace(sample, id=frame.id, patient=frame.patient, video=frame.video, masks=torch.from_numpy(masks))

    def _masks(self, frame: Frame) -> NDArray[np.bool_]:
        size = (frame.height, frame.width)
        files = [frame.masks[phrase] for phrase in self.phrases]
        return np.stack([np.zeros(size, bool) if f is None else read_mask(self.root / f, size=size) for f in files])
