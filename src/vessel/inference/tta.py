"""InputGeometry of an image for test-time augmentation: flips, quarter turns and scales, each with its exact way back.

A view changes the image before tiles and frame are cut from it. The network answers on the pixels of the view, and
going back only moves pixels: nothing is interpolated. A scale makes structures look smaller, by mirrored borders around
the image, or larger, by leaving borders away; where borders are left away the view has no say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vessel.errors import VesselError

FLIPS = ("flip_lr", "flip_ud")
TURNS = ("turn_90", "turn_180", "turn_270")
SCALES = ("scale_0.8", "scale_1.25")
AUGMENTATIONS = (*FLIPS, *TURNS, *SCALES)

_AXES = {"flip_lr": -1, "flip_ud": -2}
_QUARTERS = {"turn_90": 1, "turn_180": 2, "turn_270": 3}


def check_augmentations(tta: Sequence[str]) -> tuple[str, ...]:
    """The names of views, each once.

    Raises:
        VesselError: one is unknown, or there twice.
    """
    names = tuple(tta)
    if unknown := [name for name in names if name not in AUGMENTATIONS]:
        raise VesselError(f"tta={list(names)}: {unknown[0]} is none; choose among {', '.join(AUGMENTATIONS)}")
    if len(set(names)) < len(names):
        raise VesselError(f"tta={list(names)}: one is there twice; name each once")
    return names


def augment_image(image: NDArray[np.uint8], view: str) -> NDArray[np.uint8]:
    """A view of an image.

    Args:
        image: uint8 [H, W, 3].
        view: its name.

    Returns:
        uint8 [h, w, 3]: turned by 90° the sides change places, a scale adds or takes a border on each side.
    """
    if view in _AXES:
        return np.ascontiguousarray(np.flip(image, _AXES[view] + 2))
    if view in _QUARTERS:
        return np.ascontiguousarray(np.rot90(image, _QUARTERS[view]))
    height, width = image.shape[:2]
    rows, columns = _borders((height, width), view)
    if rows < 0 or columns < 0:
        return np.ascontiguousarray(image[-rows : height + rows, -columns : width + columns])
    return np.pad(image, ((rows, rows), (columns, columns), (0, 0)), mode="symmetric")


def average_augmented(own: Tensor, others: Iterable[tuple[str, Tensor]]) -> Tensor:
    """The mean over an image and its views, pixel by pixel over those that show it.

    Args:
        own: float32 [K, H, W], of the image itself.
        others: the name of each view with its float32 [K, h, w].

    Returns:
        float32 [K, H, W]. Sums are taken in float64, so that equal maps give the very same map.
    """
    total, count = own.double(), torch.ones(own.shape[-2:], dtype=torch.float64)
    for view, one in others:
        back, (rows, columns) = _back(one, view, (own.shape[-2], own.shape[-1]))
        total[:, rows, columns] += back
        count[rows, columns] += 1
    return (total / count).float()


def _back(one: Tensor, view: str, size: tuple[int, int]) -> tuple[Tensor, tuple[slice, slice]]:
    """A map of a view on the pixels of the image, and which rows and columns of it these are."""
    whole = slice(None), slice(None)
    if view in _AXES:
        return one.flip(_AXES[view]), whole
    if view in _QUARTERS:
        return torch.rot90(one, -_QUARTERS[view], dims=(-2, -1)), whole
    (height, width), (rows, columns) = size, _borders(size, view)
    if rows < 0 or columns < 0:
        return one, (slice(-rows, height + rows), slice(-columns, width + columns))
    return one[:, rows : rows + height, columns : columns + width], whole


def _borders(size: tuple[int, int], view: str) -> tuple[int, int]:
    """Rows above and below, columns left and right: added when positive, left away when negative."""
    share = (1 / float(view.removeprefix("scale_")) - 1) / 2
    return round(size[0] * share), round(size[1] * share)
