"""SAM2 with a language prompt: the sam2 package's network, driven by the `[SEG]` embedding as third sparse token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vessel.batch import FeaturePyramid


@contextmanager
def _hydra_as_found() -> Iterator[None]:
    """Undo what `import sam2` does: it initialises Hydra's global state, after which no command could start."""
    was_initialised = GlobalHydra.instance().is_initialized()
    yield
    if not was_initialised:
        GlobalHydra.instance().clear()


with _hydra_as_found():
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import RoPEAttention
    from sam2.modeling.sam2_base import SAM2Base


@dataclass(frozen=True)
class GroundingConfig:
    """Configuration of SAM2; the defaults are `sam2_hiera_large`, generation 2.0.

    Attributes:
        frame_size: side of the input frame, pixels, a multiple of 32.
        embed_dim, heads: width and heads of Hiera's first stage; both double at each stage.
        stages, windows: blocks and window size of each of the four stages.
        global_blocks: indices of blocks with global attention; none may be the first of a stage.
        background: spatial size of Hiera's position table.
        width: width of the feature pyramid, the mask decoder and the prompt.
        memory_width, memory_layers, memory_mlp: the video memory, which images do not use.
    """

    frame_size: int = 1024
    embed_dim: int = 144
    heads: int = 2
    stages: Sequence[int] = (2, 6, 36, 4)
    windows: Sequence[int] = (8, 4, 16, 8)
    global_blocks: Sequence[int] = (23, 33, 43)
    background: Sequence[int] = (7, 7)
    width: int = 256
    memory_width: int = 64
    memory_layers: int = 4
    memory_mlp: int = 2048


@dataclass(frozen=True)
class FrameFeatures:
    """Features of B frames as the mask decoder reads them, computed once for any number of phrases.

    Attributes:
        top: [B, C, S/16, S/16].
        high: [B, C/8, S/4, S/4] and [B, C/4, S/8, S/8], already projected for the mask decoder.
    """

    top: Tensor
    high: tuple[Tensor, Tensor]

    def of(self, index: Tensor) -> FrameFeatures:
        """Take the features of the frames that `index` (int64 [N]) names."""
        return FrameFeatures(self.top[index], (self.high[0][index], self.high[1][index]))


class Grounding(SAM2Base):
    """SAM2 whose mask decoder takes a language embedding as prompt.

    Parameter names are those of the sam2 package, so that its weights load as they are.
    """

    def encode(self, frames: Tensor) -> FrameFeatures:
        """Encode normalised frames [B, 3, S, S] as the mask decoder reads them."""
        return self.features(self.encode_frame(frames))

    def encode_frame(self, frames: Tensor) -> FeaturePyramid:
        """Encode normalised frames [B, 3, S, S] into a feature pyramid; a frozen encoder keeps no graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(self.image_encoder)):
            # its upsampling returns float32 whatever it is given
            return FeaturePyramid(*(level.to(frames.dtype) for level in self.image_encoder(frames)["backbone_fpn"]))

    def features(self, pyramid: FeaturePyramid) -> FrameFeatures:
        """Prepare a pyramid for the mask decoder, by two layers of the decoder's own."""
        decoder = self.sam_mask_decoder
        return FrameFeatures(pyramid.top, (decoder.conv_s0(pyramid.high), decoder.conv_s1(pyramid.middle)))

    def checkpoint_activations(self) -> None:
        """Keep only the input of each block of the image encoder where gradients are wanted."""
        for block in self.image_encoder.trunk.blocks:
            # the method alone: a wrapping module would change the names of tensors
            block.forward = partial(_recomputed, block.forward)

    def decode(self, features: FrameFeatures, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Decode masks for N prompts.

        Args:
            features: of N frames, one per prompt.
            prompts: [N, C], the projected `[SEG]` states.

        Returns:
            three candidate masks' logits float32 [N, 3, S/4, S/4] and their predicted IoU [N, 3].
        """
        masks, ious, _, _ = self.candidates(self.without_memory(features.top), features.high, prompts)
        return masks, ious

    def without_memory(self, top: Tensor) -> Tensor:
        """Mark features [N, C, s, s] as those of an image, or of a frame without memory."""
        return top + self.no_mem_embed.reshape(1, -1, 1, 1)

    def candidates(
        self, features: Tensor, high: tuple[Tensor, Tensor], prompts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode three candidates for each of N masks.

        Args:
            features: [N, C, S/16, S/16], with or without memory.
            high: as in `FrameFeatures`, N each.
            prompts: [N, C], the projected `[SEG]` states; None where the memory alone prompts.

        Returns:
            mask logits float32 [N, 3, S/4, S/4], predicted IoU float32 [N, 3], mask tokens [N, 3, C], and logits
            [N, 1] of there being an object. A mask is not overwritten where that is negative: Sa2VA was trained so.
        """
        encoder = self.sam_prompt_encoder
        # Without a click SAM2 pads twice with "not a point"; the language embedding comes third.
        sparse = encoder.not_a_point_embed.weight[None].expand(len(features), 2, -1)
        if prompts is not None:
            sparse = torch.cat([sparse, prompts[:, None]], dim=1)
        masks, ious, tokens, appears = self.sam_mask_decoder(
            image_embeddings=features,
            image_pe=self._dense_position().to(features.dtype),
            sparse_prompt_embeddings=sparse.to(features.dtype),
            dense_prompt_embeddings=encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(features),
            multimask_output=True,
            repeat_image=False,
            high_res_features=list(high),
        )
        return masks.float(), ious.float(), tokens, appears

    def _dense_position(self) -> Tensor:
        """Compute the random Fourier position of every cell: float32 [1, C, s, s].

        The method of sam2 itself fails on bf16 weights.
        """
        matrix = self.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.float()
        side = self.sam_image_embedding_size
        centres = (torch.arange(side, dtype=torch.float32, device=matrix.device) + 0.5) / side
        y, x = torch.meshgrid(2 * centres - 1, 2 * centres - 1, indexing="ij")
        # a product by elements, which autocast leaves in float32
        angles = 2 * torch.pi * (x[..., None] * matrix[0] + y[..., None] * matrix[1])
        return torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)[None]


def trains(module: nn.Module) -> bool:
    """Return True if any of its parameters gets a gradient."""
    return any(p.requires_grad for p in module.parameters())


def _recomputed(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x)
    output: Tensor = checkpoint(forward, x, use_reentrant=False)
    return output


def best_candidate(masks: Tensor, ious: Tensor) -> Tensor:
    """Take the candidate with the highest predicted IoU: masks [N, 3, h, w], ious [N, 3] -> [N, h, w]."""
    return masks[torch.arange(len(masks), device=masks.device), ious.argmax(dim=1)]


def build_grounding(sizes: GroundingConfig) -> Grounding:
    """Build SAM2 with random weights."""
    channels = [sizes.embed_dim * 2**stage for stage in reversed(range(4))]
    encoder = ImageEncoder(
        scalp=1,
        trunk=Hiera(
            embed_dim=sizes.embed_dim,
            num_heads=sizes.heads,
            stages=tuple(sizes.stages),
            global_att_blocks=tuple(sizes.global_blocks),
            window_pos_embed_bkg_spatial_size=tuple(sizes.background),
            window_spec=tuple(sizes.windows),
        ),
        neck=FpnNeck(
            position_encoding=PositionEmbeddingSine(sizes.width, normalize=True, warmup_cache=False),
            d_model=sizes.width,
            backbone_channel_list=channels,
            fpn_top_down_levels=[2, 3],
            fpn_interp_model="nearest",
        ),
    )
    grounding = Grounding(
        image_encoder=encoder,
        memory_attention=_memory_attention(sizes),
        memory_encoder=_memory_encoder(sizes),
        image_size=sizes.frame_size,
        num_maskmem=7,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=False,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        use_mlp_for_obj_ptr_proj=True,
    )
    # An untrained head must not choose among the candidates: with equal predictions the first is always taken.
    # Otherwise the choice wanders from image to image and the masks are trained in turns.
    last = grounding.sam_mask_decoder.iou_prediction_head.layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return grounding


def _memory_attention(sizes: GroundingConfig) -> MemoryAttention:
    def rope(**extra: object) -> RoPEAttention:
        side = sizes.frame_size // 16
        return RoPEAttention(
            embedding_dim=sizes.width, num_heads=1, downsample_rate=1, dropout=0.1, feat_sizes=(side, side), **extra
        )

    layer = MemoryAttentionLayer(
        activation="relu",
        cross_attention=rope(rope_k_repeat=True, kv_in_dim=sizes.memory_width),
        d_model=sizes.width,
        dim_feedforward=sizes.memory_mlp,
        dropout=0.1,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=rope(),
    )
    return MemoryAttention(d_model=sizes.width, pos_enc_at_input=True, layer=layer, num_layers=sizes.memory_layers)


def _memory_encoder(sizes: GroundingConfig) -> MemoryEncoder:
    block = CXBlock(dim=sizes.width, kernel_size=7, padding=3, layer_scale_init_value=1e-6, use_dwconv=True)
    return MemoryEncoder(
        out_dim=sizes.memory_width,
        in_dim=sizes.width,
        mask_downsampler=MaskDownSampler(embed_dim=sizes.width, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(block, num_layers=2),
        position_encoding=PositionEmbeddingSine(sizes.memory_width, normalize=True, warmup_cache=False),
    )
