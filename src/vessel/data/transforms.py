"""From an image to what the network sees: tiles for the vision encoder, one frame for SAM2; and augmentation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vessel.batch import InputGeometry

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version


@lru_cache(maxsize=1024)  # a data set has few sizes
def tile_grid(width: int, height: int, *, tile: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows of tiles whose shape is nearest to the image's (InternVL's dynamic tiling).

    Of grids with equally near shapes the larger one is taken only when the image has more than half its pixels.
    """
    grids = {(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles}
    best, best_difference = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        difference = abs(width / height - columns / rows)
        is_tie = difference == best_difference and width * height > 0.5 * tile * tile * columns * rows
        if difference < best_difference or is_tie:
            best, best_difference = (columns, rows), difference
    return best


def tile_count(width: int, height: int, geometry: InputGeometry) -> int:
    """Tiles that an image is cut into, thumbnail counted."""
    columns, rows = tile_grid(width, height, tile=geometry.tile, max_tiles=geometry.max_tiles)
    return columns * rows + (columns * rows > 1)


def cut_tiles(image: NDArray[np.uint8], geometry: InputGeometry) -> Tensor:
    """Tiles of an RGB image [H, W, 3], row by row, then a thumbnail when there is more than one: uint8 [T, 3, t, t]."""
    side = geometry.tile
    height, width = image.shape[:2]
    columns, rows = tile_grid(width, height, tile=side, max_tiles=geometry.max_tiles)
    resized = _resize(image, columns * side, rows * side)
    tiles = resized.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    return tiles if len(tiles) == 1 else torch.cat([tiles, _resize(image, side, side)[None]])


def whole_frame(image: NDArray[np.uint8], geometry: InputGeometry) -> Tensor:
    """The whole image as SAM2 sees it, aspect ratio not kept: uint8 [3, S, S]."""
    return _resize(image, geometry.frame, geometry.frame)


def _resize(image: NDArray[np.uint8], width: int, height: int) -> Tensor:
    """Another size of an RGB image [H, W, 3]: uint8 [3, height, width]."""
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.stack([np.asarray(band) for band in resized.split()]))


@dataclass
class Augmentation:
    """Random changes of image and masks together, endlessly many.

    Attributes:
        variants: how many pictures can come of one image; None says endlessly many.
        flip: mirror left-right and upside down.
        rotate: largest angle, degrees.
        scale: largest relative change of size.
        shift: largest shift, share of the side.
        brightness, contrast: largest relative changes.
        gamma: largest change of gamma, percent.
        blur: chance of a slight Gaussian blur.
        noise: chance of Gaussian noise.
    """

    variants: ClassVar[None] = None
    flip: bool = True
    rotate: float = 180.0
    scale: float = 0.1
    shift: float = 0.05
    brightness: float = 0.2
    contrast: float = 0.2
    gamma: float = 20.0
    blur: float = 0.1
    noise: float = 0.1

    def __post_init__(self) -> None:
        import albumentations as A

        flips = [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)] if self.flip else []
        self._compose = A.Compose(
            [
                *flips,
                A.Affine(
                    rotate=(-self.rotate, self.rotate),
                    scale=(1 - self.scale, 1 + self.scale),
                    translate_percent=(-self.shift, self.shift),
                    p=0.9,
                ),
                A.RandomBrightnessContrast(self.brightness, self.contrast, p=0.5),
                A.RandomGamma((100 - self.gamma, 100 + self.gamma), p=0.3),
                A.GaussianBlur(sigma_limit=(0.3, 1.0), blur_limit=0, p=self.blur),
                A.GaussNoise(std_range=(0.01, 0.05), p=self.noise),
            ]
        )

    def __call__(
        self, image: NDArray[np.uint8], masks: NDArray[np.bool_], seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Change an image [H, W, 3] and its masks [K, H, W] alike; the same seed gives the same change."""
        # One generator for all: `set_random_seed` would seed every transform alike, so that all fire together.
        self._compose.set_random_state(np.random.default_rng(seed), Random(seed))
        changed: Mapping[str, Any] = self._compose(image=image, masks=list(masks.astype(np.uint8)))
        return changed["image"], np.stack(changed["masks"]).astype(bool)


class QuarterTurns:
    """Mirror images and quarter turns: pixels only move, and few pictures come of one image.

    Eight of a square one; of another the four that keep its shape, as turned it would be cut into other tiles.

    Attributes:
        variants: how many pictures can come of one image at most.
    """

    variants: ClassVar[int] = 8

    def __call__(
        self, image: NDArray[np.uint8], masks: NDArray[np.bool_], seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Change an image [H, W, 3] and its masks [K, H, W] alike; the same seed gives the same change."""
        mirrored, turns = Random(seed).choice(self._ways(image))
        return _turned(image, mirrored, turns, axes=(0, 1)), _turned(masks, mirrored, turns, axes=(1, 2))

    def outcomes(self, image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """All that can come of an image [H, W, 3], itself first."""
        return [_turned(image, mirrored, turns, axes=(0, 1)) for mirrored, turns in self._ways(image)]

    @staticmethod
    def _ways(image: NDArray[np.uint8]) -> list[tuple[bool, int]]:
        turns = range(4) if image.shape[0] == image.shape[1] else (0, 2)
        return [(mirrored, quarters) for mirrored in (False, True) for quarters in turns]


def _turned(pixels: NDArray[Any], mirrored: bool, turns: int, *, axes: tuple[int, int]) -> NDArray[Any]:
    turned = np.rot90(pixels, turns, axes)
    return np.ascontiguousarray(np.flip(turned, axes[1]) if mirrored else turned)
