"""Baselines for a Sa2VA: SAM2 with a learned prompt a phrase, and a U-Net with a channel a phrase.

Neither has a language model: the phrases of the run are a fixed list, and a phrase is known by its index in it.

Letters: B images, N masks (each image as often as it has phrases), S side of the frame, C width of SAM2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from vessel.batch import Batch, InputGeometry, Output, TokenIds
from vessel.errors import VesselError
from vessel.model.grounding import Grounding, GroundingConfig, best_candidate, build_grounding, trains
from vessel.model.network import Network, normalise

_N = TypeVar("_N", bound=nn.Module)
_STRIDE = 32  # between a frame and the deepest features of a U-Net's encoder


class Baseline(Network):
    """A network whose phrases are a fixed list.

    Args:
        frame_size: side S of the frames that it takes, pixels.
        phrases: K of the run, in order.
    """

    phrases: tuple[str, ...]

    def __init__(self, frame_size: int, phrases: Sequence[str]) -> None:
        super().__init__(frame_size, phrases)

    def forward(self, batch: Batch) -> Output:
        """Predict the masks of a batch; language logits are empty.

        Raises:
            VesselError: frames have another size than the network's, or a phrase is none of its own.
        """
        self.require_frames(batch)
        images, phrases = self._images_and_phrases(batch)
        return Output(
            mask_logits=self.segment(batch.frames, images, phrases),
            seg_to_image=images,
            lm_logits=torch.empty(0, 1, device=images.device),
            lm_targets=torch.empty(0, dtype=torch.int64, device=images.device),
        )

    def segment(self, frames: Tensor, images: Tensor, phrases: Tensor) -> Tensor:
        """Segment N phrases.

        Args:
            frames: uint8 [B, 3, S, S].
            images: int64 [N], the frame of each mask.
            phrases: int64 [N], the phrase of each mask, an index into the list.

        Returns:
            mask logits float32 [N, h, w].
        """
        raise NotImplementedError

    def emitted(self, output: Output) -> Tensor:
        """Return bool [0]: there is no language model."""
        return torch.empty(0, dtype=torch.bool, device=output.mask_logits.device)

    def _images_and_phrases(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the index of the image and of the phrase of each of N masks, int64 [N] each."""
        require_known(self, [phrase for of_image in batch.phrases for phrase in of_image])
        images = [i for i, of_image in enumerate(batch.phrases) for _ in of_image]
        phrases = [self.phrases.index(phrase) for of_image in batch.phrases for phrase in of_image]
        device = batch.frames.device
        return torch.tensor(images, device=device), torch.tensor(phrases, device=device)


def require_known(network: Network, phrases: Sequence[str]) -> None:
    """Refuse phrases that a network without words was not trained on.

    Raises:
        VesselError: names them.
    """
    known = network.phrases
    if known is not None and (new := [phrase for phrase in dict.fromkeys(phrases) if phrase not in known]):
        raise VesselError(
            f"phrases: {', '.join(new)}: this network reads no words, it knows the phrases that it was trained on: "
            f"{', '.join(known)}; choose among those, or train with data.phrases=[{','.join([*known, *new])}]"
        )


@dataclass(frozen=True)
class PromptedSam2Config:
    """Configuration that fixes the shape of a SAM2 with a learned prompt a phrase.

    Attributes:
        grounding: sizes of SAM2.
    """

    grounding: GroundingConfig
    loadable: ClassVar[tuple[str, ...]] = ("grounding",)

    @property
    def geometry(self) -> InputGeometry:
        """Return the frame size, with the smallest tiles, as none are read."""
        return _without_tiles(self.grounding.frame_size)

    def build(self, tokens: TokenIds, phrases: Sequence[str]) -> PromptedSam2:
        """Build the network with random weights."""
        with torch.device("cpu"):  # Hiera reads values while it is built, which the meta device has not
            network = PromptedSam2(build_grounding(self.grounding), phrases)
        return _on_the_current_device(network)

    def with_frame_size(self, size: int) -> tuple[str, PromptedSam2Config]:
        """Return the option that sets another frame size, and the configuration with it."""
        return f"model.grounding.frame_size={size}", replace(self, grounding=replace(self.grounding, frame_size=size))


class PromptedSam2(Baseline):
    """SAM2 whose third sparse token is learned, one a phrase, in place of the language embedding of a Sa2VA.

    Args:
        grounding: SAM2.
        phrases: K of the run, in order.
    """

    def __init__(self, grounding: Grounding, phrases: Sequence[str]) -> None:
        super().__init__(grounding.image_size, phrases)
        self.grounding = grounding
        self.phrase_prompts = nn.Embedding(len(phrases), grounding.hidden_dim)  # initialised as SAM2's own prompts are

    def segment(self, frames: Tensor, images: Tensor, phrases: Tensor) -> Tensor:
        """Segment N phrases, as `Baseline.segment`: [N, S/4, S/4], of the candidate with the highest predicted IoU."""
        device, dtype = self.grounding.no_mem_embed.device, self.grounding.no_mem_embed.dtype
        features = self.grounding.encode(normalise(frames.to(device)).to(dtype))
        prompts = self.phrase_prompts(phrases.to(self.phrase_prompts.weight.device)).to(device)
        return best_candidate(*self.grounding.decode(features.of(images.to(device)), prompts))

    def parts(self) -> Mapping[str, nn.Module]:
        """Return image encoder and mask decoder by name."""
        own = self.grounding
        return {"SAM2 image encoder": own.image_encoder, "mask decoder": own.sam_mask_decoder}

    def modules_to_compile(self) -> Sequence[nn.Module]:
        """Return the trunk of the image encoder."""
        return [self.grounding.image_encoder.trunk]

    def checkpoint_activations(self) -> None:
        """Recompute the blocks of the image encoder where it trains; a frozen one keeps nothing anyway."""
        if trains(self.grounding.image_encoder):
            self.grounding.checkpoint_activations()


@dataclass(frozen=True)
class UNetConfig:
    """Configuration that fixes the shape of a U-Net.

    Attributes:
        encoder: as segmentation-models-pytorch calls it; weights of the ResNets are read from local files.
        decoder: channels of its five stages, the deepest first.
        frame_size: side of the input frame and of the masks, pixels, a multiple of 32.
    """

    encoder: str = "resnet34"
    decoder: Sequence[int] = (256, 128, 64, 32, 16)
    frame_size: int = 512
    loadable: ClassVar[tuple[str, ...]] = ("unet.encoder",)

    @property
    def geometry(self) -> InputGeometry:
        """Return the frame size, with the smallest tiles, as none are read."""
        return _without_tiles(self.frame_size)

    def build(self, tokens: TokenIds, phrases: Sequence[str]) -> UNet:
        """Build the network with random weights; nothing is downloaded.

        Raises:
            VesselError: the package is not there, or a size is none that it builds.
        """
        if self.frame_size % _STRIDE:
            raise VesselError(
                f"model.frame_size={self.frame_size}: a U-Net halves it five times; give a multiple of {_STRIDE}"
            )
        try:
            from segmentation_models_pytorch import Unet
        except ModuleNotFoundError as error:
            raise VesselError(
                f"model=unet needs segmentation-models-pytorch ({error}): pip install 'vessel[baselines]'"
            ) from error
        with torch.device("cpu"):  # some encoders read values while they are built
            try:
                unet = Unet(
                    self.encoder, encoder_weights=None, decoder_channels=tuple(self.decoder), classes=len(phrases)
                )
            except (KeyError, ValueError, RuntimeError) as error:
                raise VesselError(
                    f"model.encoder={self.encoder} model.decoder={list(self.decoder)}: {error}"
                ) from error
            network = UNet(unet, self.frame_size, phrases)
        return _on_the_current_device(network)

    def with_frame_size(self, size: int) -> tuple[str, UNetConfig]:
        """Return the option that sets another frame size, and the configuration with it."""
        return f"model.frame_size={size}", replace(self, frame_size=size)


class UNet(Baseline):
    """A U-Net (arXiv 1505.04597) with a channel a phrase, at the resolution of the frame.

    Args:
        unet: from images [B, 3, S, S] to logits [B, K, S, S].
        frame_size: side S of the frames that it takes, pixels.
        phrases: K of the run, in order.
    """

    def __init__(self, unet: nn.Module, frame_size: int, phrases: Sequence[str]) -> None:
        super().__init__(frame_size, phrases)
        self.unet = unet

    def segment(self, frames: Tensor, images: Tensor, phrases: Tensor) -> Tensor:
        """Segment N phrases, as `Baseline.segment`: [N, S, S]."""
        first = next(self.unet.parameters())
        logits: Tensor = self.unet(normalise(frames.to(first.device)).to(first.dtype))
        return logits[images.to(logits.device), phrases.to(logits.device)].float()

    def parts(self) -> Mapping[str, nn.Module]:
        """Return encoder and decoder by name."""
        return {
            "U-Net encoder": self.unet.get_submodule("encoder"),
            "U-Net decoder": self.unet.get_submodule("decoder"),
        }

    def modules_to_compile(self) -> Sequence[nn.Module]:
        """Return the whole U-Net."""
        return [self.unet]

    def checkpoint_activations(self) -> None:
        """Refuse: batch normalisation would count a batch twice.

        Raises:
            VesselError: always.
        """
        raise VesselError(
            "activation_checkpointing=true: layers of a U-Net are not computed twice, as its batch normalisation would "
            "count a batch twice; leave it false. A smaller data.batch_size or model.frame_size needs less memory"
        )


def _on_the_current_device(network: _N) -> _N:
    device = torch.get_default_device()
    return network if device.type == "cpu" else network.to(device)  # on the CPU it may be without content already


def _without_tiles(frame_size: int) -> InputGeometry:
    return InputGeometry(tile_size=1, tokens_per_tile=1, max_tiles=1, frame_size=frame_size)
