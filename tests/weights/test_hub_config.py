"""`config.json` of an export: as the public code reads it, and as vessel reads it back."""

import json
from dataclasses import replace

import pytest
import torch
from tests.conftest import SIZES
from tests.golden import NETWORKS

from vessel.model.grounding import GroundingConfig
from vessel.model.mllm import VisionConfig
from vessel.weights.architecture import read_sizes
from vessel.weights.hub_config import limits_of_public_code, native_config, public_config

FP32, BF16 = torch.float32, torch.bfloat16
INTERNLM2 = replace(SIZES, language=replace(SIZES.language, family="internlm2", rms_eps=1e-5, rope_factor=2.0))
FAMILIES = {"qwen2": SIZES, "internlm2": INTERNLM2}


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_read_from_the_config_are_those_that_it_was_written_from(plan, family):
    sizes = replace(FAMILIES[family], max_tiles=12)  # the public code has no other number
    chosen = plan(sizes=sizes)
    shapes = {name: tuple(tensor.shape) for name, tensor in chosen.build().state_dict().items()}
    for make in (public_config, native_config):
        config = json.loads(json.dumps(make(sizes, chosen.tokens, template="phi3_chat", dtype=BF16)))
        assert read_sizes(config, shapes, grounding=sizes.grounding) == sizes
        assert config["template"] == "phi3_chat"


def test_internvit_6b_is_stated_in_the_config(prompt):
    vision = VisionConfig(width=3200, layers=45, heads=25, mlp=12800, norm="rms_norm", qk_norm=True, qkv_bias=False)
    sizes = replace(SIZES, vision=vision)
    written = public_config(sizes, prompt.token_ids, template="internlm2_chat", dtype=BF16)["vision_config"]
    stated = {
        key: written[key] for key in ("hidden_size", "num_hidden_layers", "norm_type", "qk_normalization", "qkv_bias")
    }
    assert stated == {
        "hidden_size": 3200, "num_hidden_layers": 45, "norm_type": "rms_norm", "qk_normalization": True,
        "qkv_bias": False,
    }  # fmt: skip


# Every key of the recorded config.json that the public code reads; another value would change its behaviour.
KEYS = {
    "": (
        "architectures", "model_type", "auto_map", "template", "hidden_size", "force_image_size", "downsample_ratio",
        "ps_version", "select_layer", "dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail",
        "pad2square", "use_llm_lora", "use_backbone_lora", "tie_word_embeddings",
    ),
    "llm_config": (
        "architectures", "model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_theta",
        "rope_scaling", "tie_word_embeddings", "use_cache",
    ),
    "vision_config": (
        "architectures", "model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
        "num_channels", "image_size", "patch_size", "layer_norm_eps", "norm_type", "qkv_bias", "qk_normalization",
        "hidden_act", "attention_dropout", "dropout", "drop_path_rate", "use_flash_attn",
    ),
}  # fmt: skip
OF_A_FAMILY = {"internlm2": ("bias",), "qwen2": ("attention_dropout", "use_sliding_window", "sliding_window")}


@pytest.fixture(params=NETWORKS)
def golden(request, golden_network):
    return golden_network(request.param)


def test_config_of_the_recorded_networks_equals_theirs(golden):
    model, family = golden.model, golden.model.sizes.language.family
    ours = public_config(model.sizes, model.prompt.token_ids, template=model.prompt.name, dtype=FP32)
    theirs = json.loads((golden.folder / "config.json").read_text())
    for part, keys in KEYS.items():
        own, public = (ours[part], theirs[part]) if part else (ours, theirs)
        more = OF_A_FAMILY[family] if part == "llm_config" else ()
        assert {key: own[key] for key in (*keys, *more)} == {key: public[key] for key in (*keys, *more)}
        assert own.keys() <= public.keys()
    assert ours["llm_config"]["vocab_size"] == len(model.prompt.tokenizer)


def test_limits_of_the_public_code_are_listed(plan):
    true = replace(SIZES, vision=VisionConfig(), grounding=GroundingConfig(), max_tiles=12)
    assert limits_of_public_code(true) == []
    assert len(limits_of_public_code(SIZES)) == 2
    assert "12 tiles of 448" in limits_of_public_code(replace(true, max_tiles=1))[0]
