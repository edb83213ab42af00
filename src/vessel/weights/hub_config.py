"""`config.json` of an export, as the public Sa2VA code reads it."""

from __future__ import annotations

from typing import Any

import torch

from vessel.batch import TokenIds
from vessel.model.grounding import GroundingConfig
from vessel.model.mllm import VISION_EPS, LanguageConfig, VisionConfig
from vessel.model.sa2va import Sa2VAConfig

NATIVE_TYPE = "vessel_sa2va"
REMOTE_CODE = "modeling_sa2va_chat.py"
_MODEL, _CONFIG = "modeling_sa2va_chat.Sa2VAChatModel", "configuration_sa2va_chat.Sa2VAChatConfig"
_PUBLIC_TILE, _PUBLIC_TILES = 448, 12


def public_config(sizes: Sa2VAConfig, tokens: TokenIds, *, template: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return `config.json` as the public Sa2VA writes it.

    Its vocabulary is that of the embedding, which in every public Sa2VA has a row for each entry of the tokenizer.

    Args:
        sizes: of the network.
        tokens: of its prompt.
        template: name of the chat format.
        dtype: of the tensors.
    """
    stored = {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": False}
    return {
        "architectures": ["Sa2VAChatModel"],
        "model_type": "sa2va_chat",
        "auto_map": {"AutoConfig": _CONFIG, "AutoModel": _MODEL, "AutoModelForCausalLM": _MODEL},
        "template": template,
        "hidden_size": sizes.language.width,
        "force_image_size": sizes.vision.tile_size,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "dynamic_image_size": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": sizes.max_tiles,
        "use_thumbnail": True,
        "pad2square": False,
        "use_llm_lora": 0,
        "use_backbone_lora": 0,
        **stored,
        "llm_config": _language_config(sizes.language, tokens) | stored,
        "vision_config": _vision_config(sizes.vision) | {"dtype": stored["dtype"]},
    }


def native_config(sizes: Sa2VAConfig, tokens: TokenIds, *, template: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return `config.json` for tensors under our names, which no public class reads."""
    config = public_config(sizes, tokens, template=template, dtype=dtype)
    del config["architectures"], config["auto_map"]
    return config | {"model_type": NATIVE_TYPE}


def limits_of_public_code(sizes: Sa2VAConfig) -> list[str]:
    """List, in sentences, settings of this network that the public code does not support; empty for a public one."""
    limits = []
    if (sizes.vision.tile_size, sizes.max_tiles) != (_PUBLIC_TILE, _PUBLIC_TILES):
        limits.append(
            f"The public code cuts an image into {_PUBLIC_TILES} tiles of {_PUBLIC_TILE} pixels at most, whatever "
            f"config.json states; this network takes {sizes.max_tiles} of {sizes.vision.tile_size}."
        )
    large, own = GroundingConfig(), sizes.grounding
    if (own.frame_size, own.embed_dim, tuple(own.stages)) != (large.frame_size, large.embed_dim, tuple(large.stages)):
        limits.append("The public code builds the large SAM2 only, and this network has another.")
    return limits


def _language_config(sizes: LanguageConfig, tokens: TokenIds) -> dict[str, Any]:
    common = {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": sizes.rms_eps,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": None if sizes.rope_factor is None else {"type": "dynamic", "factor": sizes.rope_factor},
        "hidden_act": "silu",
        "use_cache": True,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }
    if sizes.family == "internlm2":  # its public class has biases by default
        return {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False, **common}
    own = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return {**own, "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, **common}


def _vision_config(sizes: VisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",  # the public code's name for every InternViT
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_channels": 3,
        "image_size": sizes.tile_size,
        "patch_size": sizes.patch,
        "layer_norm_eps": VISION_EPS,
        "norm_type": sizes.norm,
        "qkv_bias": sizes.qkv_bias,
        "qk_normalization": sizes.qk_norm,
        "hidden_act": "gelu",
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "use_flash_attn": False,
    }
