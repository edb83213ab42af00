"""Turn an image into the inputs of the network, tiles for the vision encoder and one frame for SAM2; augment it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vessel.batch import InputGeometry
from vessel.errors import VesselError

if TYPE_CHECKING:
    from albumentations import BaseCompose, BasicTransform

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would query the internet for a newer version


@lru_cache(maxsize=1024)  # a data set has few sizes
def tile_grid(width: int, height: int, *, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Choose the columns and rows of tiles whose shape is nearest to the image's (InternVL's dynamic tiling).

    Of grids with equally near shapes the larger one is taken only when the image has more than half its pixels.
    """
    grids = {(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles}
    best, best_difference = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        difference = abs(width / height - columns / rows)
        is_tie = difference == best_difference and width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or is_tie:
            best, best_difference = (columns, rows), difference
    return best


def tile_count(width: int, height: int, geometry: InputGeometry) -> int:
    """Count the tiles that an image is cut into, with the thumbnail."""
    columns, rows = tile_grid(width, height, tile_size=geometry.tile_size, max_tiles=geometry.max_tiles)
    return columns * rows + (columns * rows > 1)


def cut_tiles(image: NDArray[np.uint8], geometry: InputGeometry) -> Tensor:
    """Cut an RGB image [H, W, 3] into tiles, row by row, then a thumbnail if there are several: uint8 [T, 3, t, t]."""
    side = geometry.tile_size
    height, width = image.shape[:2]
    columns, rows = tile_grid(width, height, tile_size=side, max_tiles=geometry.max_tiles)
    resized = _resize(image, columns * side, rows * side)
    tiles = resized.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    return tiles if len(tiles) == 1 else torch.cat([tiles, _resize(image, side, side)[None]])


def whole_frame(image: NDArray[np.uint8], geometry: InputGeometry) -> Tensor:
    """Resize the whole image for SAM2, aspect ratio not kept: uint8 [3, S, S]."""
    return _resize(image, geometry.frame_size, geometry.frame_size)


def _resize(image: NDArray[np.uint8], width: int, height: int) -> Tensor:
    """Resize an RGB image [H, W, 3]: uint8 [3, height, width]."""
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.stack([np.asarray(band) for band in resized.split()]))


class Augmentation:
    """Random changes of an image together with its masks, of endlessly many outcomes.

    Args:
        transforms: of albumentations, applied in this order, each with its own probability `p`.

    Attributes:
        variants: how many pictures can come of one image; None for endlessly many.

    Raises:
        VesselError: one of them is no transform of albumentations, whose random numbers could not be seeded.
    """

    variants: ClassVar[None] = None

    def __init__(self, transforms: Sequence[BasicTransform | BaseCompose]) -> None:
        import albumentations as A

        if wrong := [one for one in transforms if not isinstance(one, A.BasicTransform | A.BaseCompose)]:
            raise VesselError(f"data.augmentation.transforms: {wrong[0]!r} is no transform of albumentations")
        self._compose = A.Compose(list(transforms))

    def __call__(
        self, image: NDArray[np.uint8], masks: NDArray[np.bool_], seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Change an image [H, W, 3] and its masks [K, H, W] alike; the same seed gives the same change.

        Raises:
            VesselError: the transforms make something else than an image of bytes.
        """
        # One generator for all: `set_random_seed` would seed every transform alike, so that all fire together.
        self._compose.set_random_state(np.random.default_rng(seed), Random(seed))
        changed: Mapping[str, Any] = self._compose(image=image, masks=list(masks.astype(np.uint8)))
        augmented = changed["image"]
        if not isinstance(augmented, np.ndarray) or augmented.dtype != np.uint8 or augmented.shape[2:] != (3,):
            raise VesselError(
                "data.augmentation.transforms: an image must stay uint8 [H, W, 3]; leave out transforms that normalise "
                "it, change its channels or make a tensor of it: the network does that itself"
            )
        return augmented, np.stack(changed["masks"]).astype(bool)


class QuarterTurns:
    """Mirror images and quarter turns: pixels only move, and few pictures come of one image.

    A square image has eight; another has the four that keep its shape, since a turned one has other tiles.

    Attributes:
        variants: how many pictures can come of one image at most.
    """

    variants: ClassVar[int] = 8

    def __call__(
        self, image: NDArray[np.uint8], masks: NDArray[np.bool_], seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Change an image [H, W, 3] and its masks [K, H, W] alike; the same seed gives the same change."""
        mirrored, turns = Random(seed).choice(self._symmetries(image))
        return _turned(image, mirrored, turns, axes=(0, 1)), _turned(masks, mirrored, turns, axes=(1, 2))

    def outcomes(self, image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """List all pictures that can come of an image [H, W, 3], itself first."""
        return [_turned(image, mirrored, turns, axes=(0, 1)) for mirrored, turns in self._symmetries(image)]

    @staticmethod
    def _symmetries(image: NDArray[np.uint8]) -> list[tuple[bool, int]]:
        turns = range(4) if image.shape[0] == image.shape[1] else (0, 2)
        return [(mirrored, quarters) for mirrored in (False, True) for quarters in turns]


def _turned(pixels: NDArray[Any], mirrored: bool, turns: int, *, axes: tuple[int, int]) -> NDArray[Any]:
    turned = np.rot90(pixels, turns, axes)
    return np.ascontiguousarray(np.flip(turned, axes[1]) if mirrored else turned)
