"""The dataclasses that travel between loader, network, losses and metrics; they need torch only.

Shape letters: B images, K phrases of one image, N = sum of K over the batch (every phrase is one `[SEG]`),
T tiles of one image, L tokens, P supervised tokens, S side of the SAM2 frame, H W native image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class TokenIds:
    """Ids that network and prompt must agree on."""

    seg: int
    image: int
    pad: int
    eos: int


@dataclass(frozen=True)
class InputGeometry:
    """The sizes in which an image enters the network; data and network take them from here.

    Attributes:
        tile_size: side of a tile for the vision encoder, pixels.
        tokens_per_tile: image tokens that the vision encoder makes of one tile.
        max_tiles: tiles of an image at most, thumbnail not counted.
        frame_size: side S of the SAM2 frame, pixels.
    """

    tile_size: int
    tokens_per_tile: int
    max_tiles: int
    frame_size: int


class FeaturePyramid(NamedTuple):
    """The feature pyramid of SAM2's image encoder for B frames, before anything that trains when the encoder does not.

    Attributes:
        high: [B, C, S/4, S/4].
        middle: [B, C, S/8, S/8].
        top: [B, C, S/16, S/16].
    """

    high: Tensor
    middle: Tensor
    top: Tensor


class Features(NamedTuple):
    """The outputs of the frozen encoders for one image.

    Attributes:
        tile_features: [T, P, v], features of its tiles before the projector.
        pyramid: of its frame alone, B = 1.
    """

    tile_features: Tensor
    pyramid: FeaturePyramid

    def map(self, function: Callable[[Tensor], Tensor]) -> Features:
        """Apply a function to every tensor."""
        return Features(function(self.tile_features), FeaturePyramid(*map(function, self.pyramid)))


@dataclass(frozen=True)
class Sample:
    """One image with its phrases, ready to be collated.

    Attributes:
        id: frame id in the data set, unique.
        patient: pseudonym of the patient; the unit of splits and intervals.
        video: pseudonym of the pullback or angiography run.
        phrases: K phrases, in the order of their `[SEG]` tokens.
        tiles: uint8 [T, 3, t, t], RGB tiles for the vision encoder (thumbnail last when T > 1); none with features.
        frame: uint8 [3, S, S], the whole image for SAM2, aspect ratio not kept; [3, 0, 0] with features.
        input_ids: int64 [L].
        labels: int64 [L], -100 where a token is not supervised.
        size: native (H, W); masks and predictions have this size.
        masks: bool [K, H, W], an all-false mask declares the phrase absent; None without ground truth.
        regions: bool [R, s, s], the features of the last tile, of its s x s, in each region that the question refers
            to; None when it refers to none.
        features: cached ones, in place of tiles and frame.
    """

    id: str
    patient: str
    video: str
    phrases: tuple[str, ...]
    tiles: Tensor
    frame: Tensor
    input_ids: Tensor
    labels: Tensor
    size: tuple[int, int]
    masks: Tensor | None = None
    regions: Tensor | None = None
    features: Features | None = None


@dataclass  # not frozen: Lightning's half and DeepSpeed precisions refuse a frozen dataclass
class Batch:
    """B samples collated. No code assigns to the fields of a batch; `dataclasses.replace` makes a changed one.

    Attributes:
        ids, patients, videos, phrases, sizes: as in `Sample`, one entry an image.
        tiles: uint8 [sum of T, 3, t, t], of the images without features.
        frames: uint8 [B, 3, S, S], of the images without features.
        input_ids: int64 [B, L], right-padded.
        attention_mask: bool [B, L].
        labels: int64 [B, L], -100 where a token is not supervised.
        masks: one bool [K, H, W] an image, or None without ground truth.
        regions: one bool [R, s, s] an image, or None without regions.
        features: an entry an image, None where its tiles and frame are to be encoded; None when all are.
    """

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    videos: tuple[str, ...]
    phrases: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[int, int], ...]
    tiles: Tensor
    frames: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    masks: tuple[Tensor, ...] | None = None
    regions: tuple[Tensor, ...] | None = None
    features: tuple[Features | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self, move: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: move(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.masks is not None:
            moved["masks"] = tuple(move(m) for m in self.masks)
        if self.regions is not None:
            moved["regions"] = tuple(move(r) for r in self.regions)
        if self.features is not None:
            moved["features"] = tuple(known and known.map(move) for known in self.features)
        return replace(self, **moved)

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """Move every tensor; arguments as `Tensor.to` takes them."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory; the DataLoader calls this."""
        return self._map(Tensor.pin_memory)


class Output(NamedTuple):
    """The outputs of the network for a batch; a tuple, as DeepSpeed finds tensors in nothing else.

    Attributes:
        mask_logits: float32 [N, h, w], a quarter of the SAM2 frame a side; of a U-Net the whole frame.
        seg_to_image: int64 [N], the image of the batch that each `[SEG]` belongs to.
        lm_logits: [P, V], logits that predict the supervised tokens; P is 0 without a language model.
        lm_targets: int64 [P], those tokens.
    """

    mask_logits: Tensor
    seg_to_image: Tensor
    lm_logits: Tensor
    lm_targets: Tensor


class StepOutput(NamedTuple):
    """The outputs of `validation_step` and `test_step` for callbacks; a tuple as `Output`.

    Attributes:
        loss: scalar.
        probabilities: one float32 [K, H, W] an image at native size, values in [0, 1].
    """

    loss: Tensor
    probabilities: tuple[Tensor, ...]


def collate(samples: list[Sample], pad_id: int) -> Batch:
    """Right-pad the tokens and stack the rest.

    Raises:
        ValueError: when only some of the samples carry masks, or regions.
    """
    for what in ("masks", "regions"):
        missing = [s.id for s in samples if getattr(s, what) is None]
        if 0 < len(missing) < len(samples):
            raise ValueError(f"samples with and without {what} in one batch; without: {missing}")
    lengths = torch.tensor([len(s.input_ids) for s in samples])
    to_encode = [s for s in samples if s.features is None]

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return Batch(
        ids=tuple(s.id for s in samples),
        patients=tuple(s.patient for s in samples),
        videos=tuple(s.video for s in samples),
        phrases=tuple(s.phrases for s in samples),
        sizes=tuple(s.size for s in samples),
        tiles=torch.cat([s.tiles for s in samples]),
        frames=torch.stack([s.frame for s in to_encode]) if to_encode else samples[0].frame[None][:0],
        input_ids=padded([s.input_ids for s in samples], pad_id),
        attention_mask=torch.arange(int(lengths.max()))[None] < lengths[:, None],
        labels=padded([s.labels for s in samples], -100),
        masks=tuple(s.masks for s in samples if s.masks is not None) or None,
        regions=tuple(s.regions for s in samples if s.regions is not None) or None,
        features=tuple(s.features for s in samples) if len(to_encode) < len(samples) else None,
    )


def upsample(mask_logits: Tensor, frame_size: int, size: tuple[int, int]) -> Tensor:
    """Bring decoder logits to an image's own size, as the public model does.

    Args:
        mask_logits: [K, h, w].
        frame_size: side S of the SAM2 frame; the logits pass through S x S.
        size: native (H, W).

    Returns:
        float32 [K, H, W].
    """
    logits = F.interpolate(mask_logits[:, None].float(), (frame_size, frame_size), mode="bilinear", align_corners=False)
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[:, 0]
