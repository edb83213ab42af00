"""Sa2VA: a vision-language model whose `[SEG]` token prompts the mask decoder of SAM2.

Letters: B images, N `[SEG]` tokens of the batch, T tiles, L tokens, d width of the language model, C width of SAM2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from vessel.batch import Batch, FeaturePyramid, InputGeometry, Output, TokenIds
from vessel.errors import VesselError
from vessel.model.grounding import Grounding, GroundingConfig, best_candidate, build_grounding, trains
from vessel.model.mllm import LanguageConfig, VisionConfig, build_mllm
from vessel.model.network import Network, normalise


@dataclass(frozen=True)
class Sa2VAConfig:
    """Configuration that fixes the shape of a Sa2VA.

    Attributes:
        language, vision, grounding: sizes of the three networks.
        max_tiles: tiles of an image at most, thumbnail not counted.
    """

    language: LanguageConfig
    vision: VisionConfig
    grounding: GroundingConfig
    max_tiles: int = 12
    loadable: ClassVar[tuple[str, ...]] = ("mllm", "grounding", "text_hidden_fcs")

    @property
    def geometry(self) -> InputGeometry:
        """Return the sizes to which images are cut and resized for this network."""
        return InputGeometry(
            self.vision.tile_size, self.vision.tokens_per_tile, self.max_tiles, self.grounding.frame_size
        )

    def build(self, tokens: TokenIds, phrases: Sequence[str]) -> Sa2VA:
        """Build the network with random weights; it reads any phrase, so those of the run do not matter."""
        return build_sa2va(self, tokens)

    def with_frame_size(self, size: int) -> tuple[str, Sa2VAConfig]:
        """Return the option that sets another frame size, and the configuration with it."""
        return f"model.grounding.frame_size={size}", replace(self, grounding=replace(self.grounding, frame_size=size))


class Sa2VA(Network):
    """A Sa2VA of three built parts, which may lie on different devices: tensors follow them.

    Args:
        mllm: InternVL with its language head.
        grounding: SAM2 with the language embedding as prompt.
        tokens: ids of `[SEG]` and of the image token.
    """

    def __init__(self, mllm: InternVLForConditionalGeneration, grounding: Grounding, tokens: TokenIds) -> None:
        super().__init__(grounding.image_size)
        width = mllm.lm_head.in_features
        self.mllm = mllm
        self.grounding = grounding
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, grounding.hidden_dim), nn.Dropout(0.0)
        )
        self.tokens = tokens

    def forward(self, batch: Batch) -> Output:
        """Compute masks and language logits in a teacher-forced pass.

        The answer, `[SEG]` tokens included, is part of `batch.input_ids`.

        Raises:
            VesselError: image tokens and vision features differ in number, frames have another size than the
                network's, or masks and `[SEG]` tokens differ in number.
        """
        self._check(batch)
        hidden = self.hidden_states(batch)
        at_seg = (batch.input_ids == self.tokens.seg).nonzero(as_tuple=True)
        supervised = (batch.labels[:, 1:] != -100).nonzero(as_tuple=True)
        return Output(
            mask_logits=self.decode_masks(self.frame_pyramid(batch), _at(hidden, at_seg), at_seg[0]),
            seg_to_image=at_seg[0],
            lm_logits=self.mllm.lm_head(_at(hidden, supervised)),
            lm_targets=batch.labels[:, 1:][supervised],
        )

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """Encode tiles uint8 [T, 3, t, t] into features [T, P, v], four patches a feature, not projected.

        No graph is kept through a frozen encoder.

        Args:
            tiles: uint8 [T, 3, t, t], RGB.

        Returns:
            [T, P, v] in the dtype of the encoder.
        """
        own = self.mllm.model
        tower = own.vision_tower
        pixels = normalise(tiles.to(_device(tower))).to(tower.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(tower)):
            # the first is the class token
            patches = tower(pixel_values=pixels, return_dict=True).last_hidden_state[:, 1:]
            side = math.isqrt(patches.shape[1])
            four = own.pixel_shuffle(patches.unflatten(1, (side, side)), scale_factor=own.config.downsample_ratio)
            return four.flatten(1, 2).to(tower.dtype)

    def embed(self, input_ids: Tensor, tile_features: Tensor, regions: Sequence[Tensor] | None = None) -> Tensor:
        """Embed tokens, with the projected features of tiles at image tokens: [B, L, d].

        Args:
            input_ids: int64 [B, L].
            tile_features: [T, P, v], by `encode_tiles` of the tiles of all images, in their order.
            regions: one bool [R, s, s] an image; the features of its last tile that a region covers come once more,
                region by region, after those of its tiles.

        Raises:
            VesselError: the number of image tokens is not the number of features.
        """
        table = self.mllm.get_input_embeddings()
        features = self.mllm.model.multi_modal_projector(tile_features)
        embeddings = table(input_ids.to(_device(table)))
        is_image = input_ids == self.tokens.image
        count = features.shape[0] * features.shape[1] + sum(int(held.sum()) for held in regions or ())
        if int(is_image.sum()) != count:
            raise VesselError(
                f"the prompt holds {int(is_image.sum())} image tokens but the vision encoder made {count} features of "
                f"{len(tile_features)} tiles; build prompts with vessel.data.prompt and the network's own geometry"
            )
        if regions is not None:
            features = _with_regions(features, is_image.sum(1).tolist(), regions)
        is_image = is_image.to(embeddings.device)
        return embeddings.masked_scatter(is_image[:, :, None], features.to(embeddings))

    def hidden_states(self, batch: Batch) -> Tensor:
        """Compute the last hidden states, after the final norm: [B, L, d]."""
        return self.mllm.model.language_model(
            inputs_embeds=self.embed(batch.input_ids, self.tile_features(batch), batch.regions),
            attention_mask=batch.attention_mask.to(_device(self.mllm.get_input_embeddings())),
            use_cache=False,
        ).last_hidden_state

    def encode_frame(self, frames: Tensor) -> FeaturePyramid:
        """Encode frames uint8 [B, 3, S, S] by SAM2's image encoder."""
        parameter = self.grounding.no_mem_embed
        return self.grounding.encode_frame(normalise(frames.to(parameter.device)).to(parameter.dtype))

    def decode_masks(self, pyramid: FeaturePyramid, seg_states: Tensor, seg_to_image: Tensor) -> Tensor:
        """Decode the masks of N `[SEG]` tokens.

        Args:
            pyramid: of B frames.
            seg_states: [N, d], hidden states at the tokens.
            seg_to_image: int64 [N], the frame of each.

        Returns:
            logits float32 [N, S/4, S/4], of the candidate with the highest predicted IoU.
        """
        device = self.grounding.no_mem_embed.device
        prompts = self.text_hidden_fcs(seg_states.to(_device(self.text_hidden_fcs))).to(device)
        features = self.grounding.features(pyramid)
        return best_candidate(*self.grounding.decode(features.of(seg_to_image.to(device)), prompts))

    def tile_features(self, batch: Batch) -> Tensor:
        """Encode the tiles of a batch, but for features that it brings: [sum of T, P, v]."""
        if batch.features is None:
            return self.encode_tiles(batch.tiles)
        tower = self.mllm.model.vision_tower
        tiles = (batch.input_ids == self.tokens.image).sum(1) // self.mllm.config.image_seq_length
        unknown = [int(n) for n, known in zip(tiles, batch.features, strict=True) if known is None]
        fresh = iter(self.encode_tiles(batch.tiles).split(unknown) if unknown else ())
        known_or_fresh = (
            next(fresh) if known is None else known.tile_features.to(_device(tower), tower.dtype)
            for known in batch.features
        )
        return torch.cat(list(known_or_fresh))

    def frame_pyramid(self, batch: Batch) -> FeaturePyramid:
        """Encode the frames of a batch, but for features that it brings."""
        if batch.features is None:
            return self.encode_frame(batch.frames)
        parameter = self.grounding.no_mem_embed
        fresh: Iterator[Iterable[Tensor]] = iter(())
        if len(batch.frames):
            fresh = zip(*(level.split(1) for level in self.encode_frame(batch.frames)), strict=True)
        images = (
            next(fresh) if known is None else (level.to(parameter.device, parameter.dtype) for level in known.pyramid)
            for known in batch.features
        )
        return FeaturePyramid(*(torch.cat(levels) for levels in zip(*images, strict=True)))

    def emitted(self, output: Output) -> Tensor:
        """Mark where the language model itself would have chosen the `[SEG]` of the answer: bool [N]."""
        at_seg = (output.lm_targets == self.tokens.seg).to(output.lm_logits.device)
        return output.lm_logits[at_seg].argmax(-1) == self.tokens.seg

    def parts(self) -> Mapping[str, nn.Module]:
        """Return encoders, projector, language model, head and mask decoder by name."""
        own = self.mllm.model
        return {
            "vision encoder": own.vision_tower,
            "projector": own.multi_modal_projector,
            "language model": own.language_model,
            "head of the language model": self.mllm.lm_head,
            "SAM2 image encoder": self.grounding.image_encoder,
            "mask decoder": self.grounding.sam_mask_decoder,
        }

    def checkpoint_activations(self) -> None:
        """Keep only the input of each layer in training, and compute the layer again in the backward pass.

        For the language model, and for the encoders where they train: in a frozen one nothing is kept anyway. Names of
        tensors, validation and results stay as they are.
        """
        own = self.mllm.model
        language = own.language_model
        # Non-reentrant recomputation follows the graph that was recorded, so the gradients of adapters are right even
        # where no input of a layer requires one; nothing has to pretend that the embeddings train.
        language.activation_checkpointing_enable({"use_reentrant": False})
        language.disable_input_require_grads()
        if trains(own.vision_tower):
            own.vision_tower.activation_checkpointing_enable({"use_reentrant": False})
        if trains(self.grounding.image_encoder):
            self.grounding.checkpoint_activations()

    def modules_to_compile(self) -> Sequence[nn.Module]:
        """Return the layers of both encoders and of the language model; those of Hiera differ, so its trunk is one."""
        own = self.mllm.model
        return [*own.vision_tower.encoder.layer, self.grounding.image_encoder.trunk, *own.language_model.layers]

    def _check(self, batch: Batch) -> None:
        self.require_frames(batch)
        phrases = [len(p) for p in batch.phrases]
        found = (batch.input_ids == self.tokens.seg).sum(1).tolist()
        if found != phrases:
            raise VesselError(f"images {list(batch.ids)} hold {phrases} phrases but {found} [SEG] tokens")


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _at(states: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Take the states [B, L, d] at N positions, row and column int64 [N]: [N, d]."""
    return states[tuple(index.to(states.device) for index in positions)]


def _with_regions(features: Tensor, counts: Sequence[int], regions: Sequence[Tensor]) -> Tensor:
    """Put the features [T, P, d] into the order of the image tokens of B prompts, `counts` each: [sum of counts, d]."""
    parts: list[Tensor] = []
    for count, held in zip(counts, regions, strict=True):
        tiles = (count - int(held.sum())) // features.shape[1]
        own, features = features[:tiles], features[tiles:]
        parts += [own.flatten(0, 1), own[-1].expand(len(held), -1, -1)[held.flatten(1)]]
    return torch.cat(parts)


def build_sa2va(sizes: Sa2VAConfig, tokens: TokenIds) -> Sa2VA:
    """Build the network with random weights on the current device (`with torch.device("meta")` counts for free)."""
    mllm = build_mllm(sizes.language, sizes.vision, tokens)
    with torch.device("cpu"):  # Hiera reads values while it is built, which the meta device has not
        grounding = build_grounding(sizes.grounding)
    device = torch.get_default_device()
    return Sa2VA(mllm, grounding if device.type == "cpu" else grounding.to(device), tokens)
