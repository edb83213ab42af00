"""The interface of all three networks for the task, the callbacks, the memory plan and prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from vessel.batch import Batch, InputGeometry, Output, TokenIds, upsample
from vessel.errors import VesselError
from vessel.model.groups import trainable_groups

# Channel statistics of ImageNet: every encoder here was trained with them.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def normalise(images: Tensor) -> Tensor:
    """Standardise RGB images: uint8 [N, 3, h, w] -> float32 [N, 3, h, w]."""
    mean = torch.tensor(_MEAN, dtype=torch.float32, device=images.device).view(3, 1, 1)
    std = torch.tensor(_STD, dtype=torch.float32, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


class Network(nn.Module):
    """A network that segments each phrase in each image.

    Args:
        frame_size: side S of the frames that it takes, pixels.
        phrases: the only ones that it knows, in order; None for a network that reads any.
    """

    def __init__(self, frame_size: int, phrases: Sequence[str] | None = None) -> None:
        super().__init__()
        self.frame_size = frame_size
        self.phrases = None if phrases is None else tuple(phrases)

    def forward(self, batch: Batch) -> Output:
        """Predict the masks of a batch, and the language logits where there is a language model."""
        raise NotImplementedError

    def probabilities(self, output: Output, batch: Batch) -> tuple[Tensor, ...]:
        """Return the probabilities of each image at its native size: float32 [K, H, W], values in [0, 1]."""
        per_image = output.mask_logits.split([len(p) for p in batch.phrases])
        return tuple(
            upsample(logits, self.frame_size, size).sigmoid()
            for logits, size in zip(per_image, batch.sizes, strict=True)
        )

    def emitted(self, output: Output) -> Tensor:
        """Mark where the language model itself would have chosen `[SEG]`: bool [N], or [0] where there is none."""
        raise NotImplementedError

    def trainable_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Return the trainable parameters by group, in the network's order."""
        return trainable_groups(self)

    def parts(self) -> Mapping[str, nn.Module]:
        """Return the modules whose activations a memory plan counts, by name; each runs at most once at a time."""
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """Keep only the input of each layer in training, and compute the layer again in the backward pass.

        Raises:
            VesselError: this network cannot.
        """
        raise NotImplementedError

    def modules_to_compile(self) -> Sequence[nn.Module]:
        """Return the modules that take most of the time; those of one class share their compiled code."""
        raise NotImplementedError

    def compile_layers(self, backend: str = "inductor") -> None:
        """Have torch compile `modules_to_compile` at their first use; names of tensors stay as they are."""
        for module in self.modules_to_compile():
            module.compile(backend=backend)

    def require_frames(self, batch: Batch) -> None:
        """Refuse frames of another size.

        Raises:
            VesselError: with both sizes.
        """
        if len(batch.frames) and tuple(batch.frames.shape[-2:]) != (self.frame_size, self.frame_size):
            raise VesselError(
                f"frames of {tuple(batch.frames.shape[-2:])} pixels for a network of {self.frame_size} x "
                f"{self.frame_size}: train and predict with the one resolution of the run's `model`"
            )


class NetworkConfig(Protocol):
    """Configuration that fixes the shape of a network.

    Attributes:
        loadable: modules that weights may give; the others always begin at random.
    """

    loadable: ClassVar[tuple[str, ...]]

    @property
    def geometry(self) -> InputGeometry:
        """Return the sizes to which images are cut and resized for this network."""

    def build(self, tokens: TokenIds, phrases: Sequence[str]) -> Network:
        """Build the network with random weights, on the current device.

        Args:
            tokens: ids that the prompt uses.
            phrases: of the run.
        """

    def with_frame_size(self, size: int) -> tuple[str, Self]:
        """Return the option that sets another frame size, and the configuration with it."""
