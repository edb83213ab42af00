"""The multimodal language model: transformers' InternVL with a Qwen2 or an InternLM2 inside, built from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
)

from vessel.batch import TokenIds
from vessel.errors import VesselError

Norm = Literal["layer_norm", "rms_norm"]
# In every public InternViT; transformers has it as a constant for the norms of query and key.
VISION_EPS = 1e-6

Language = Literal["qwen2", "internlm2"]


@dataclass(frozen=True)
class LanguageConfig:
    """Configuration of Qwen2 or InternLM2.

    Attributes:
        width, layers, heads, kv_heads, mlp: as in a Qwen2 configuration; a head is width / heads wide.
        vocabulary: rows of the embedding, added tokens included; 151,679 is the public Sa2VA.
        context: longest sequence in tokens.
        family: `qwen2` has biases on query, key and value, `internlm2` has none and is built as a Llama.
        rms_eps: added to the mean square in each norm.
        rope_theta: base of the rotary frequencies.
        rope_factor: of dynamic NTK scaling, which grows that base for sequences longer than `context` and changes
            nothing below; None for no scaling.

    Raises:
        VesselError: unknown family.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int = 151_679
    context: int = 32_768
    family: Language = "qwen2"
    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_factor: float | None = None

    def __post_init__(self) -> None:
        if self.family not in get_args(Language):
            raise VesselError(f"model.language.family={self.family}: use one of {', '.join(get_args(Language))}")


@dataclass(frozen=True)
class VisionConfig:
    """Configuration of InternViT; the defaults are InternViT-300M-448px.

    Attributes:
        tile_size: side of a tile, pixels.
        patch: side of a patch, pixels; a tile holds an even number of patches a side.
        norm: before attention and MLP: `layer_norm`, or `rms_norm` as in InternViT-6B.
        qk_norm: RMSNorm over the whole width of query and of key, before they are cut into heads.
        qkv_bias: biases on query, key and value.

    Raises:
        VesselError: unknown norm.
    """

    tile_size: int = 448
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    norm: Norm = "layer_norm"
    qk_norm: bool = False
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise VesselError(f"model.vision.norm={self.norm}: use one of {', '.join(get_args(Norm))}")

    @property
    def tokens_per_tile(self) -> int:
        """Return the image tokens of one tile: patches after 2 x 2 pixel shuffle."""
        return (self.tile_size // self.patch) ** 2 // 4


def build_mllm(language: LanguageConfig, vision: VisionConfig, tokens: TokenIds) -> InternVLForConditionalGeneration:
    """Build InternVL with random weights; embedding and head are not tied, as in every public Sa2VA.

    Weights are drawn with standard deviation 1 / sqrt(width), about the 0.02 that transformers takes for large widths;
    with 0.02 the states of a small network for different phrases would be nearly the same for hundreds of steps.
    """
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            intermediate_size=vision.mlp,
            image_size=(vision.tile_size, vision.tile_size),
            patch_size=(vision.patch, vision.patch),
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_norm,
            norm_type=vision.norm,
            layer_norm_eps=VISION_EPS,
            initializer_range=vision.width**-0.5,
        ),
        text_config=_language_config(language, tokens),
        image_token_id=tokens.image,
        image_seq_length=vision.tokens_per_tile,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _language_config(sizes: LanguageConfig, tokens: TokenIds) -> Qwen2Config | LlamaConfig:
    rope: dict[str, str | float] = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    if sizes.rope_factor is not None:
        rope |= {"rope_type": "dynamic", "factor": sizes.rope_factor}
    return {"qwen2": Qwen2Config, "internlm2": LlamaConfig}[sizes.family](
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        intermediate_size=sizes.mlp,
        max_position_embeddings=sizes.context,
        rope_parameters=rope,
        rms_norm_eps=sizes.rms_eps,
        initializer_range=sizes.width**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokens.eos,
        pad_token_id=tokens.pad,
    )
