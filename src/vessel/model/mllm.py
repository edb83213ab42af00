"""The multimodal language model: transformers' InternVL with a Qwen2 inside, built from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from vessel.batch import TokenIds


@dataclass(frozen=True)
class LanguageSizes:
    """Sizes of Qwen2.

    Attributes:
        width, layers, heads, kv_heads, mlp: as in a Qwen2 configuration.
        vocabulary: rows of the embedding, added tokens included; 151,679 is the public Sa2VA.
        context: longest sequence in tokens.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int = 151_679
    context: int = 32_768


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of InternViT; the defaults are InternViT-300M-448px.

    Attributes:
        tile: side of a tile, pixels.
        patch: side of a patch, pixels; a tile holds an even number of patches a side.
    """

    tile: int = 448
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile: patches after 2 x 2 pixel shuffle."""
        return (self.tile // self.patch) ** 2 // 4


def build_mllm(language: LanguageSizes, vision: VisionSizes, tokens: TokenIds) -> InternVLForConditionalGeneration:
    """Build InternVL with random weights; embedding and head are not tied, as in every public Sa2VA.

    Weights are drawn with standard deviation 1 / sqrt(width), about the 0.02 that transformers takes for large widths;
    0.02 would leave what a small network says about different phrases nearly the same for hundreds of steps.
    """
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            intermediate_size=vision.mlp,
            image_size=(vision.tile, vision.tile),
            patch_size=(vision.patch, vision.patch),
            attention_bias=True,
            initializer_range=vision.width**-0.5,
        ),
        text_config=Qwen2Config(
            vocab_size=language.vocabulary,
            hidden_size=language.width,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.kv_heads,
            intermediate_size=language.mlp,
            max_position_embeddings=language.context,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            rms_norm_eps=1e-6,
            initializer_range=language.width**-0.5,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokens.eos,
            pad_token_id=tokens.pad,
        ),
        image_token_id=tokens.image,
        image_seq_length=vision.tokens_per_tile,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)
