"""Loss functions: tensors in, scalars out.

Formulas of the public Sa2VA training code: binary cross-entropy and Dice on mask logits, cross-entropy on the tokens of
an answer.
Letters: N masks, P points or pixels of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vessel.batch import upsample

# The public code divides sums by "count + 1e-4 + eps".
_COUNT_EPS = 1e-4 + torch.finfo(torch.float32).eps


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross-entropy over supervised positions, 0 where there are none; logits [P, V], int64 [P]."""
    return F.cross_entropy(logits.float(), targets) if len(targets) else logits.new_zeros(())


def mask_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean binary cross-entropy, logits and targets float [N, P], targets in [0, 1]."""
    total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return total / (logits.numel() + _COUNT_EPS)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the naive soft Dice loss with smoothing 1, averaged over N masks; logits and targets float [N, P].

    An empty target is driven towards an empty prediction: 1 - 1 / (sum of probabilities + 1).
    """
    probabilities = logits.sigmoid()
    intersection = (probabilities * targets).sum(-1)
    dice = 1 - (2 * intersection + 1) / (probabilities.sum(-1) + targets.sum(-1) + 1)
    return dice.sum() / (len(dice) + _COUNT_EPS)


def sample_at(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps [N, h, w] at points [N, P, 2] (x, y in [0, 1]) bilinearly: float [N, P]."""
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(maps[:, None].float(), grid, align_corners=False)[:, 0, :, 0]


def uncertain_points(logits: Tensor, count: int, *, oversample: float, importance: float) -> Tensor:
    """Draw points where the prediction is least certain (PointRend, arXiv 1912.08193).

    Args:
        logits: [N, h, w].
        count: points of a mask.
        oversample: candidates drawn per point.
        importance: share of the points kept for their small absolute logit; the rest is uniform.

    Returns:
        float32 [N, count, 2], x and y in [0, 1].
    """
    with torch.no_grad():
        candidates = torch.rand(len(logits), int(count * oversample), 2, device=logits.device)
        certainty = sample_at(logits, candidates).abs()
        kept = certainty.topk(int(importance * count), largest=False).indices
        important = candidates.gather(1, kept[:, :, None].expand(-1, -1, 2))
        uniform = torch.rand(len(logits), count - kept.shape[1], 2, device=logits.device)
    return torch.cat([important, uniform], dim=1)


@dataclass(frozen=True)
class NativeLoss:
    """Loss at each mask's own resolution: logits are upsampled to the mask, the mask is never made smaller.

    Attributes:
        lm_weight, mask_weight, dice_weight: weights of cross-entropy on tokens, cross-entropy on pixels, Dice.
    """

    lm_weight: float = 1.0
    mask_weight: float = 2.0
    dice_weight: float = 0.5

    def __call__(self, mask_logits: Tensor, masks: Sequence[Tensor], frame_size: int) -> Mapping[str, Tensor]:
        """Compute the mask losses of a batch.

        Args:
            mask_logits: [N, h, w], decoder resolution.
            masks: one bool [K, H, W] an image, N in all, in the order of `mask_logits`.
            frame_size: side of the SAM2 frame, through which logits are upsampled as in prediction.

        Returns:
            weighted scalars `mask_loss` and `dice_loss`.
        """
        bce, dice = [], []
        for logits, masks_of_image in zip(mask_logits.split([len(m) for m in masks]), masks, strict=True):
            height, width = masks_of_image.shape[-2:]
            full = upsample(logits, frame_size, (height, width)).flatten(1)
            target = masks_of_image.flatten(1).float()
            bce.append(mask_bce(full, target) * len(masks_of_image))
            dice.append(dice_loss(full, target) * len(masks_of_image))
        n = len(mask_logits)
        return {
            "mask_loss": self.mask_weight * torch.stack(bce).sum() / n,
            "dice_loss": self.dice_weight * torch.stack(dice).sum() / n,
        }


@dataclass(frozen=True)
class Sa2vaLoss:
    """The loss of the public training: its terms on sampled points of the decoder's map.

    Points are read from logits and from the mask at its own resolution, so that the target is soft and no mask is
    resized beforehand; the public code shrinks the mask by nearest neighbour first, which loses thin vessels.

    Attributes:
        lm_weight, mask_weight, dice_weight: as in `NativeLoss`.
        points: points of a mask.
        oversample, importance: as in `uncertain_points`.
    """

    lm_weight: float = 1.0
    mask_weight: float = 2.0
    dice_weight: float = 0.5
    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75

    def __call__(self, mask_logits: Tensor, masks: Sequence[Tensor], frame_size: int) -> Mapping[str, Tensor]:
        """Compute the losses as `NativeLoss` does; `frame_size` is not used."""
        logits = mask_logits.float()
        points = uncertain_points(logits, self.points, oversample=self.oversample, importance=self.importance)
        per_image = zip(masks, points.split([len(m) for m in masks]), strict=True)
        targets = torch.cat([sample_at(mask, where) for mask, where in per_image])
        predictions = sample_at(logits, points)
        return {
            "mask_loss": self.mask_weight * mask_bce(predictions, targets),
            "dice_loss": self.dice_weight * dice_loss(predictions, targets),
        }


class Loss(Protocol):
    """A mask loss with the weight of the language-model loss beside it."""

    @property
    def lm_weight(self) -> float:
        """Return the weight of the language-model loss."""

    def __call__(self, mask_logits: Tensor, masks: Sequence[Tensor], frame_size: int) -> Mapping[str, Tensor]:
        """Compute the weighted mask losses by name."""
