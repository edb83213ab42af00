"""Configuration, names and template of a public folder, from its `config.json` and the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from vessel.errors import VesselError
from vessel.model.grounding import GroundingConfig
from vessel.model.mllm import VISION_EPS, Language, LanguageConfig, Norm, VisionConfig
from vessel.model.sa2va import Sa2VAConfig
from vessel.weights.hub_config import NATIVE_TYPE
from vessel.weights.names import PublicNames

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

# SAM 2.0 as published, by size. The names of conf/sam2 are these.
PUBLIC_SAM2 = {
    "tiny": GroundingConfig(
        embed_dim=96, heads=1, stages=(1, 2, 7, 2), windows=(8, 4, 14, 7), global_blocks=(5, 7, 9)
    ),
    "small": GroundingConfig(
        embed_dim=96, heads=1, stages=(1, 2, 11, 2), windows=(8, 4, 14, 7), global_blocks=(7, 10, 13)
    ),
    "base_plus": GroundingConfig(
        embed_dim=112, heads=2, stages=(2, 3, 16, 3), windows=(8, 4, 14, 7), global_blocks=(12, 16, 20),
        background=(14, 14),
    ),
    "large": GroundingConfig(),
}  # fmt: skip
# Settings that vessel computes with. transformers leaves out its defaults, which these are.
_REQUIRED = {"ps_version": "v2", "select_layer": -1, "downsample_ratio": 0.5}
_REQUIRED_BY_TRANSFORMERS = {
    "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "downsample_ratio": 0.5,
}  # fmt: skip
# By `model_type`; transformers' own folders hold an InternLM2 as a Llama.
_FAMILIES: dict[str, Language] = {"qwen2": "qwen2", "internlm2": "internlm2"}
_FAMILIES_OF_TRANSFORMERS: dict[str, Language] = {"qwen2": "qwen2", "llama": "internlm2"}
_TEMPLATES: dict[Language, str] = {"qwen2": "qwen_chat", "internlm2": "internlm2_chat"}
_EMBEDDING = "mllm.model.language_model.embed_tokens.weight"
_VIT_LAYER = "mllm.model.vision_tower.encoder.layer.0."
_GIVE_SIZES = (
    "give its sizes by network.grounding={embed_dim: ..., stages: [...], ...}, of "
    f"{', '.join(entry.name for entry in fields(GroundingConfig))}, where they are not those of SAM 2.0 large"
)
_TRUNK = "grounding.image_encoder.trunk."


def public_names(sizes: LanguageConfig) -> PublicNames:
    """Return the tensor names of a public folder of a network of these sizes."""
    return PublicNames(sizes.family, sizes.kv_heads, sizes.heads // sizes.kv_heads)


def language_family(keys: Iterable[str]) -> Language:
    """Return the family of language model that public names belong to."""
    return "internlm2" if any(".wqkv." in key for key in keys) else "qwen2"


def read_sizes(config: Config, shapes: Shapes, *, grounding: GroundingConfig | None = None) -> Sa2VAConfig:
    """Read the configuration of the network in a Sa2VA or InternVL folder.

    Args:
        config: content of its `config.json`.
        shapes: of its tensors, by our names.
        grounding: sizes of SAM2, where the folder has none or one of its own; `config.json` never states them.

    Raises:
        VesselError: a network that vessel does not build, or a setting or tensor is missing.
    """
    try:
        language, vision = _language(config, shapes), _vision(config, shapes)
    except KeyError as error:
        raise VesselError(f"config.json and the tensors beside it lack {error}: copy the whole folder again") from error
    if _is_native(config):
        _require({**_REQUIRED_BY_TRANSFORMERS, **config}, _REQUIRED_BY_TRANSFORMERS)
    else:
        _require(config, _REQUIRED)
    sam2 = _sam2(shapes) if grounding is None else grounding
    # The public code cuts into 12 tiles at most, whatever config.json states; it does not read vessel's own folders.
    own = config.get("model_type") == NATIVE_TYPE
    return Sa2VAConfig(
        language, vision, sam2, config.get("max_dynamic_patch", Sa2VAConfig.max_tiles) if own else Sa2VAConfig.max_tiles
    )


def read_template(config: Config) -> str:
    """Read the name of the chat format; for an InternVL, that of a Sa2VA with its language model.

    Raises:
        VesselError: a Sa2VA states none, or vessel does not build its language model.
    """
    if _is_native(config) or config.get("model_type") == "internvl_chat":
        return _TEMPLATES[_family(config)]
    if "template" not in config:
        raise VesselError("config.json states no template; that of every Sa2VA does: copy it again")
    return str(config["template"])


def _is_native(config: Config) -> bool:
    """Return True if transformers wrote it for its own InternVL."""
    return bool(config.get("text_config"))


def _require(config: Config, values: Config) -> None:
    for key, value in values.items():
        if config.get(key) != value:
            raise VesselError(f"config.json: {key}={config.get(key)}, and vessel builds networks of {key}={value} only")


def _language_part(config: Config) -> Config:
    return _part(config, "text_config" if _is_native(config) else "llm_config")


def _part(config: Config, name: str) -> Config:
    part = config.get(name)
    if not isinstance(part, Mapping):
        raise VesselError(f"config.json has no {name}, as that of every InternVL and Sa2VA has: copy it again")
    return part


def _family(config: Config) -> Language:
    kind = str(_language_part(config).get("model_type"))
    families = _FAMILIES_OF_TRANSFORMERS if _is_native(config) else _FAMILIES
    if kind in families:
        return families[kind]
    built = "a model built on Qwen-VL" if re.match(r"qwen.*_vl", kind) else f"a language model of type {kind}"
    raise VesselError(f"config.json: {built}; vessel knows InternVL on {' and '.join(_FAMILIES)}")


def _language(config: Config, shapes: Shapes) -> LanguageConfig:
    family, part = _family(config), _language_part(config)
    _require({"use_sliding_window": False, **part}, {"use_sliding_window": False})
    # Today's transformers writes `rope_parameters`; the public folders have a base, and a scaling or null.
    rope = part.get("rope_parameters") or part.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "dynamic"):
        raise VesselError(f"config.json: rotary embedding of type {scaling}; vessel builds default and dynamic")
    return LanguageConfig(
        width=part["hidden_size"],
        layers=part["num_hidden_layers"],
        heads=part["num_attention_heads"],
        kv_heads=part["num_key_value_heads"],
        mlp=part["intermediate_size"],
        vocabulary=shapes[_EMBEDDING][0],
        context=part["max_position_embeddings"],
        family=family,
        rms_eps=part["rms_norm_eps"],
        rope_theta=rope["rope_theta"] if "rope_theta" in rope else part["rope_theta"],
        rope_factor=rope["factor"] if scaling == "dynamic" else None,
    )


def _vision(config: Config, shapes: Shapes) -> VisionConfig:
    """Read the vision configuration; norms and biases from the tensors, which show them in every layout."""
    part = _part(config, "vision_config")
    _require(part, {"layer_norm_eps": VISION_EPS})
    norm: Norm = "layer_norm" if f"{_VIT_LAYER}layernorm_before.bias" in shapes else "rms_norm"
    return VisionConfig(
        tile_size=_side(config.get("force_image_size") or part["image_size"]),
        patch=_side(part["patch_size"]),
        width=part["hidden_size"],
        layers=part["num_hidden_layers"],
        heads=part["num_attention_heads"],
        mlp=part["intermediate_size"],
        norm=norm,
        qk_norm=f"{_VIT_LAYER}attention.q_norm.weight" in shapes,
        qkv_bias=f"{_VIT_LAYER}attention.q_proj.bias" in shapes,
    )


def _side(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]


def _sam2(shapes: Shapes) -> GroundingConfig:
    """Find the public SAM2 whose trunk has this width and these stages; each but the first begins with a projection."""
    numbers = {
        int(name.removeprefix(f"{_TRUNK}blocks.").split(".")[0])
        for name in shapes
        if name.startswith(f"{_TRUNK}blocks.")
    }
    if not numbers:
        raise VesselError(f"no SAM2 among the tensors: {_GIVE_SIZES}")
    starts = [0, *sorted(i for i in numbers if f"{_TRUNK}blocks.{i}.proj.weight" in shapes), len(numbers)]
    stages = tuple(end - start for start, end in pairwise(starts))
    width = shapes[f"{_TRUNK}patch_embed.proj.weight"][0]
    for sizes in PUBLIC_SAM2.values():
        if (sizes.embed_dim, tuple(sizes.stages)) == (width, stages):
            return sizes
    raise VesselError(
        f"its SAM2 (width {width}, stages {list(stages)}) is none of {', '.join(PUBLIC_SAM2)}, and no file states the "
        f"rest of its sizes; {_GIVE_SIZES}"
    )
