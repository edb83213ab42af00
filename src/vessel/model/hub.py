"""Weights out: a Hugging Face folder in the public Sa2VA layout, written shard by shard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vessel.batch import Views
from vessel.model.lora import merged_state
from vessel.model.sa2va import Sa2VA
from vessel.model.weights import digests, to_native, to_public

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 5 * 10**9
_ADAPTERS = re.compile(r"lora_|modules_to_save|trainable_tokens_delta")


def exported_size(network: Sa2VA, dtype: torch.dtype) -> int:
    """Bytes of the exported tensors; adapters vanish into the tensors they change."""
    state = network.state_dict().items()
    return sum(tensor.numel() for name, tensor in state if not _ADAPTERS.search(name)) * dtype.itemsize


def exported_state(network: Sa2VA, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Public names and tensors: adapters merged in float32, then cast."""
    return ((name, tensor.to(dtype)) for name, tensor in to_public(merged_state(network)))


def write_weights(
    folder: Path, state: Iterable[tuple[str, Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write safetensors, and an index when there are several; one shard at a time is in memory.

    huggingface_hub's own function wants all tensors at once, which is a second network in memory.

    Returns:
        digest of each tensor as it was in memory.
    """
    in_memory: dict[str, str] = {}
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal waiting, size
        file = folder / _shard(len(shards), 0)
        save_file(waiting, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes files for their owner only
        shards.append(list(waiting))
        waiting, size = {}, 0

    for name, tensor in state:
        if waiting and size + tensor.nbytes > shard_bytes:
            flush()
        # Tensors that share memory are refused by safetensors: each gets its own.
        waiting[name] = tensor.contiguous().clone()
        in_memory |= digests([(name, tensor)])
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    _name_shards(folder, shards, total)
    return in_memory


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    count = len(shards)
    if count == 1:
        (folder / _shard(0, 0)).rename(folder / "model.safetensors")
        return
    for index in range(count):
        (folder / _shard(index, 0)).rename(folder / _shard(index, count))
    weight_map = {name: _shard(index, count) for index, names in enumerate(shards) for name in names}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shard(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def unchanged_groups(
    network: Sa2VA, exported: Iterable[tuple[str, Tensor]], base: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> list[str]:
    """Groups that were to train and yet equal the base in every tensor.

    Args:
        network: whose parameters say what trained.
        exported: tensors of the export, public names.
        base: tensors the training started from, public names.
        dtype: of the export; the base is compared after the same cast.
    """
    before = digests((name, tensor.to(dtype)) for name, tensor in to_native(base))
    after = digests(to_native(exported))
    same = {name for name, digest in after.items() if before.get(name) == digest}
    return [
        group
        for group, members in network.trainable_groups().items()
        if all(_merged_name(name) in same for name, _ in members)
    ]


def _merged_name(name: str) -> str:
    """The tensor that a parameter, an adapter's included, is part of in the export."""
    name = re.sub(r"(lora_[AB]|modules_to_save)\.default\.", "", name)
    return re.sub(r"token_adapter\.trainable_tokens_delta\.default$", "weight", name)


def public_config(network: Sa2VA, *, template: str, views: Views, dtype: str) -> dict[str, Any]:
    """`config.json` as the public Sa2VA writes it.

    Args:
        network: without or with adapters.
        template: name of the chat format.
        views: how images are cut.
        dtype: key of `DTYPES`.
    """
    dtype_name = str(DTYPES[dtype]).removeprefix("torch.")
    module = "modeling_sa2va_chat.Sa2VAChatModel"
    language = _language_config(network) | {"dtype": dtype_name}
    return {
        "architectures": ["Sa2VAChatModel"],
        "model_type": "sa2va_chat",
        "auto_map": {
            "AutoConfig": "configuration_sa2va_chat.Sa2VAChatConfig",
            "AutoModel": module,
            "AutoModelForCausalLM": module,
        },
        "template": template,
        "hidden_size": language["hidden_size"],
        "force_image_size": views.tile,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "dynamic_image_size": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": views.max_tiles,
        "use_thumbnail": True,
        "pad2square": False,
        "use_llm_lora": 0,
        "use_backbone_lora": 0,
        "tie_word_embeddings": False,
        "dtype": dtype_name,
        "llm_config": language,
        "vision_config": _vision_config(network) | {"dtype": dtype_name},
    }


def _language_config(network: Sa2VA) -> dict[str, Any]:
    text: Any = network.mllm.config.text_config
    kept = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_dropout", "initializer_range",
        "use_sliding_window", "eos_token_id", "pad_token_id", "bos_token_id",
    )  # fmt: skip
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{name: getattr(text, name) for name in kept},
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
    }


def _vision_config(network: Sa2VA) -> dict[str, Any]:
    vision: Any = network.mllm.config.vision_config
    kept = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_channels",
        "layer_norm_eps", "hidden_act", "initializer_range",
    )  # fmt: skip
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",  # the public code's name for every InternViT
        **{name: getattr(vision, name) for name in kept},
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
        "drop_path_rate": 0.0,
        "use_flash_attn": False,
    }
