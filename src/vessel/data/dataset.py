"""Samples: one image with its phrases, read, augmented, cut into tiles and put into a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from vessel.batch import Features, InputGeometry, Sample
from vessel.data.catalog import Frame
from vessel.data.images import PreparedImages, pixel_hash
from vessel.data.masks import read_mask
from vessel.data.prompt import Prompt
from vessel.data.transforms import Augmentation, QuarterTurns, cut_tiles, whole_frame


def make_sample(
    image: NDArray[np.uint8],
    phrases: Sequence[str],
    prompt: Prompt,
    geometry: InputGeometry,
    *,
    rng: Random | None = None,
    features: Features | None = None,
) -> Sample:
    """Make a sample without ground truth, as prediction takes it.

    Args:
        image: uint8 [H, W, 3], RGB.
        phrases: what to segment, at least one.
        prompt: of the network that the sample is for.
        geometry: of the same network.
        rng: chooses the prompt templates in training; None takes the standard ones.
        features: of the image, in place of its tiles and frame.
    """
    if features is None:
        tiles, frame = cut_tiles(image, geometry), whole_frame(image, geometry)
    else:
        tiles, frame = (
            torch.empty(0, 3, geometry.tile_size, geometry.tile_size, dtype=torch.uint8),
            torch.empty(3, 0, 0).byte(),
        )
    count = len(tiles) if features is None else len(features.tile_features)
    ids, labels = prompt.encode(phrases, count * geometry.tokens_per_tile, rng=rng)
    height, width = image.shape[:2]
    return Sample(
        id="", patient="", video="", phrases=tuple(phrases), tiles=tiles, frame=frame,
        input_ids=ids, labels=labels, size=(height, width), features=features,
    )  # fmt: skip


class VesselDataset(Dataset[Sample]):
    """Frames of a prepared data set, each with every phrase; the mask of an absent phrase is empty.

    An index may run past the number of frames: `epoch * len + position` gives the frame at `position` with the prompt
    templates and augmentation of that epoch, whichever process loads it.

    Args:
        root: folder of the prepared data set.
        frames: of one part.
        phrases: K phrases, normalised.
        prompt, geometry: of the network that the samples are for.
        augmentation: None outside training.
        vary_templates: whether prompt templates are drawn at random, as in training.
        seed: of prompt templates and augmentation.

    Attributes:
        features: returns cached features of an image by the digest of its pixels, or None; called where `is_finite`.
    """

    def __init__(
        self,
        root: Path,
        frames: Sequence[Frame],
        *,
        phrases: Sequence[str],
        prompt: Prompt,
        geometry: InputGeometry,
        augmentation: Augmentation | QuarterTurns | None = None,
        vary_templates: bool = False,
        seed: int = 0,
    ) -> None:
        self.root, self.frames, self.phrases = root, list(frames), tuple(phrases)
        self.prompt, self.geometry = prompt, geometry
        self.augmentation, self.vary_templates, self.seed = augmentation, vary_templates, seed
        self.features: Callable[[str], Features | None] | None = None
        self._images = PreparedImages()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Sample:
        """Load the sample of `index`, see the class."""
        frame = self.frames[index % len(self)]
        image = self._images.read(self.root / frame.image, frame.sha256)
        masks = self._masks(frame)
        if self.augmentation is not None:
            image, masks = self.augmentation(image, masks, seed=self.seed * 1_000_003 + index)
        features = None
        if self.features is not None and self.is_finite:
            features = self.features(frame.sha256 if self.augmentation is None else pixel_hash(image))
        rng = Random(f"{self.seed} {index}") if self.vary_templates else None
        sample = make_sample(image, self.phrases, self.prompt, self.geometry, rng=rng, features=features)
        return replace(sample, id=frame.id, patient=frame.patient, video=frame.video, masks=torch.from_numpy(masks))

    @property
    def is_finite(self) -> bool:
        """Return whether augmentation makes a limited number of pictures of an image, however often it is loaded."""
        return self.augmentation is None or self.augmentation.variants is not None

    def image_variants(self, position: int) -> Sequence[NDArray[np.uint8]]:
        """List the pictures uint8 [H, W, 3] that can come of the image at a position, see `is_finite`."""
        frame = self.frames[position]
        image = self._images.read(self.root / frame.image, frame.sha256)
        return self.augmentation.outcomes(image) if isinstance(self.augmentation, QuarterTurns) else [image]

    def _masks(self, frame: Frame) -> NDArray[np.bool_]:
        size = (frame.height, frame.width)
        files = [frame.masks[phrase] for phrase in self.phrases]
        return np.stack([np.zeros(size, bool) if f is None else read_mask(self.root / f, size=size) for f in files])
