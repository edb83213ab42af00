"""Configuration and template of public folders, and refusals of settings that vessel does not compute with."""

import json
import re
from dataclasses import replace
from importlib.resources import files
from inspect import signature

import pytest
import torch
import yaml
from accelerate import init_empty_weights
from sam2.modeling.backbones.hieradet import Hiera
from tests.conftest import SIZES
from tests.weights.layouts import LANGUAGE_CONFIG, write_sa2va

from vessel.batch import TokenIds
from vessel.errors import VesselError
from vessel.files import read_json
from vessel.model.grounding import GroundingConfig, build_grounding
from vessel.model.mllm import LanguageConfig, VisionConfig, build_mllm
from vessel.model.sa2va import Sa2VAConfig
from vessel.weights.architecture import PUBLIC_SAM2, language_family, public_names, read_sizes, read_template
from vessel.weights.entry import Weights
from vessel.weights.hub_config import NATIVE_TYPE
from vessel.weights.names import PublicNames
from vessel.weights.recognition import open_source

TOKENS = TokenIds(seg=40, image=41, pad=2, eos=3)
GOLDEN_SAM2 = GroundingConfig(
    embed_dim=16, heads=1, stages=(1, 2, 2, 1), global_blocks=(4,), width=64, memory_width=16, memory_layers=2,
    memory_mlp=128,
)  # fmt: skip
GOLDEN = LanguageConfig(width=64, layers=2, heads=4, kv_heads=2, mlp=128, vocabulary=362, context=8192)
INTERNLM2 = replace(SIZES.language, family="internlm2", rms_eps=1e-5, rope_theta=5e7, rope_factor=2.5)
VIT_6B = replace(SIZES.vision, norm="rms_norm", qk_norm=True, qkv_bias=False)


def plain(value):
    return value if isinstance(value, int) else list(value)


def shapes_of(module, prefix):
    return {f"{prefix}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.fixture
def mllm():
    """Return a function: `mllm(language, vision)` builds InternVL without content, tiny by default, with its shapes."""

    def build(language=SIZES.language, vision=SIZES.vision):
        with init_empty_weights(include_buffers=False):
            network = build_mllm(language, vision, TOKENS)
        return network, shapes_of(network, "mllm")

    return build


@pytest.fixture
def original(mllm):
    """Return `config.json` of a tiny InternVL in the original layout, and its shapes."""
    language = {
        "model_type": "internlm2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 512, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 50_000_000, "rope_scaling": {"type": "dynamic", "factor": 2.5},
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 56,
        "patch_size": 14, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    config = {
        "model_type": "internvl_chat", "template": "internvl2_5", "llm_config": language, "vision_config": vision,
        "force_image_size": 56, "max_dynamic_patch": 6, "ps_version": "v2", "select_layer": -1, "downsample_ratio": 0.5,
    }  # fmt: skip
    return config, mllm(INTERNLM2, VIT_6B)[1]


@pytest.mark.parametrize(
    ("network", "language", "template"),
    [
        ("sa2va_qwen2", GOLDEN, "qwen_chat"),
        ("sa2va_internlm2", replace(GOLDEN, family="internlm2", rms_eps=1e-5), "internlm2_chat"),
    ],
)
def test_golden_folders_have_the_sizes_that_their_makers_state(golden_folder, network, language, template):
    folder = golden_folder(network)
    config = read_json(folder / "config.json")
    source = open_source(str(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in source.outline().items()}
    vision = VisionConfig(width=32, layers=2, heads=4, mlp=64)
    assert read_sizes(config, shapes, grounding=GOLDEN_SAM2) == Sa2VAConfig(language, vision, GOLDEN_SAM2, max_tiles=12)
    assert read_template(config) == template
    assert language_family(source.files.outline) == language.family
    with pytest.raises(VesselError, match=r"width 16, stages \[1, 2, 2, 1\].*network\.grounding="):
        read_sizes(config, shapes)


def test_an_original_internvl_folder(original):
    config, shapes = original
    assert read_sizes(config, shapes, grounding=SIZES.grounding) == Sa2VAConfig(INTERNLM2, VIT_6B, SIZES.grounding, 12)
    assert read_template(config) == "internlm2_chat"


def test_tiles_are_those_of_the_public_code_but_in_a_folder_of_our_own(original):
    """Read 12 tiles, a constant of the public code (specification, 1.3), whatever `max_dynamic_patch` is."""
    config, shapes = original
    for kind, tiles in (("sa2va_chat", 12), ("internvl_chat", 12), (NATIVE_TYPE, 6)):
        assert read_sizes(config | {"model_type": kind}, shapes, grounding=SIZES.grounding).max_tiles == tiles


def test_dynamic_scaling_need_not_be_stated_since_it_changes_nothing_up_to_the_context(plan, tmp_path):
    scaled = LANGUAGE_CONFIG | {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}}
    written = plan().build()
    folder = write_sa2va(tmp_path, written, llm_config=scaled)
    assert SIZES.language.rope_factor is None
    loaded = plan(weights=[Weights(str(folder))]).build()
    assert torch.equal(loaded.mllm.lm_head.weight, written.mllm.lm_head.weight)


def test_a_size_of_another_value_is_refused_with_the_option_that_sets_it(plan, compose, tmp_path):
    folder = write_sa2va(tmp_path, plan().build(), llm_config=LANGUAGE_CONFIG | {"rope_theta": 5e7})
    with pytest.raises(VesselError, match=r"model\.language\.rope_theta=1000000\.0.* 50000000\.0;") as error:
        plan(weights=[Weights(str(folder))]).build()
    option = re.search(r"\+\+model\S+[^,\s]", str(error.value))[0]
    assert compose("train", ["model=internvl3_2b", option]).model.language.rope_theta == 5e7
    assert compose("train", ["model=internvl2_5_26b", option]).model.language.rope_theta == 5e7


def test_the_recipe_of_internvl3_1b_is_its_printed_configuration(compose):
    """Compare with OpenGVLab/InternVL3-1B, but for a rotary scaling that changes nothing up to the context."""
    assert compose("train", ["model=internvl3_1b"]).model.language == LanguageConfig(
        width=896, layers=24, heads=14, kv_heads=2, mlp=4864, context=32768, rms_eps=1e-6, rope_theta=1e6
    )


@pytest.mark.parametrize("language", [SIZES.language, INTERNLM2], ids=["qwen2", "internlm2"])
@pytest.mark.parametrize("vision", [SIZES.vision, VIT_6B], ids=["300M", "6B"])
def test_a_folder_of_transformers_own(mllm, language, vision):
    network, shapes = mllm(language, vision)
    config = json.loads(network.config.to_json_string())
    sizes = Sa2VAConfig(language, vision, SIZES.grounding, max_tiles=12)
    assert read_sizes(config, shapes, grounding=SIZES.grounding) == sizes
    assert read_template(config) == {"qwen2": "qwen_chat", "internlm2": "internlm2_chat"}[language.family]
    # As transformers 4 wrote it.
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    if language.rope_factor is not None:
        config["text_config"]["rope_scaling"] = {"rope_type": "dynamic", "factor": rope["factor"]}
    config["vision_config"] |= {"image_size": 56, "patch_size": 14}
    assert read_sizes(config, shapes, grounding=SIZES.grounding) == sizes


@pytest.mark.parametrize("size", PUBLIC_SAM2)
def test_each_public_sam2_is_recognised_by_its_tensors(original, size):
    config, shapes = original
    with init_empty_weights(include_buffers=False):
        sam2 = shapes_of(build_grounding(PUBLIC_SAM2[size]), "grounding")
    assert read_sizes(config, shapes | sam2).grounding == PUBLIC_SAM2[size]


@pytest.mark.parametrize(("size", "letter"), zip(PUBLIC_SAM2, ("t", "s", "b+", "l"), strict=True))
def test_public_sam2_equals_its_package_and_the_configuration(compose, size, letter):
    theirs = yaml.safe_load((files("sam2") / f"configs/sam2/sam2_hiera_{letter}.yaml").read_text())["model"]
    defaults = {name: parameter.default for name, parameter in signature(Hiera).parameters.items()}
    trunk = defaults | theirs["image_encoder"]["trunk"]
    memory, encoder = theirs["memory_attention"], theirs["memory_encoder"]
    expected = {
        "frame_size": theirs["image_size"], "embed_dim": trunk["embed_dim"], "heads": trunk["num_heads"],
        "stages": trunk["stages"], "windows": trunk["window_spec"], "global_blocks": trunk["global_att_blocks"],
        "background": trunk["window_pos_embed_bkg_spatial_size"], "width": memory["d_model"],
        "memory_width": encoder["out_dim"], "memory_layers": memory["num_layers"],
        "memory_mlp": memory["layer"]["dim_feedforward"],
    }  # fmt: skip
    chosen = compose("train", ["model=internvl3_1b", f"sam2@model.grounding={size}"]).model.grounding
    for name, value in expected.items():
        for sizes in (PUBLIC_SAM2[size], chosen):
            assert plain(getattr(sizes, name)) == plain(value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, r"ps_version=v1.*ps_version=v2"),
        ({"select_layer": -4}, r"select_layer=-4"),
        ({"downsample_ratio": 1.0}, r"downsample_ratio=1\.0"),
        ({"ps_version": None}, r"ps_version=None"),
        ({"vision_config.layer_norm_eps": 1e-5}, r"layer_norm_eps=1e-05"),
        ({"llm_config.use_sliding_window": True}, r"use_sliding_window=True"),
        ({"llm_config.rope_scaling": {"type": "yarn", "factor": 4.0}}, r"type yarn"),
        (
            {"llm_config.model_type": "phi3"},
            r"type phi3.*qwen2 and internlm2",
        ),
        ({"llm_config.model_type": "llama"}, r"type llama"),
        ({"text_config": {"model_type": "qwen2_5_vl_text"}}, r"Qwen-VL"),
        ({"text_config": {"model_type": "qwen3_vl"}}, r"Qwen-VL"),
        ({"llm_config": None}, r"no llm_config"),
        ({"llm_config": []}, r"no llm_config"),
        ({"llm_config": None, "text_config": None}, r"no llm_config"),
        ({"vision_config": None}, r"no vision_config"),
        ({"vision_config": "intern_vit_6b"}, r"no vision_config"),
        ({}, r"no SAM2 .*network\.grounding="),
    ],
)
def test_other_networks_are_refused(original, change, message):
    config, shapes = original
    for key, value in change.items():
        *parts, last = key.split(".")
        (config[parts[0]] if parts else config)[last] = value
    with pytest.raises(VesselError, match=message):
        read_sizes(config, shapes)


def test_a_missing_setting_is_named(original):
    config, shapes = original
    del config["llm_config"]["num_attention_heads"]
    with pytest.raises(VesselError, match=r"'num_attention_heads'"):
        read_sizes(config, shapes)
    with pytest.raises(VesselError, match="template"):
        read_template({"model_type": "sa2va_chat", "llm_config": {"model_type": "qwen2"}})


def test_another_feature_layer_of_transformers_is_refused(mllm):
    network, shapes = mllm()
    config = json.loads(network.config.to_json_string())
    with pytest.raises(VesselError, match=r"vision_feature_layer=-4"):
        read_sizes(config | {"vision_feature_layer": -4}, shapes)


def test_templates_of_sa2va_are_its_own_and_of_internvl_those_of_its_language_model():
    stated = {"model_type": "sa2va_chat", "template": "phi3_chat", "llm_config": {"model_type": "qwen2"}}
    assert read_template(stated) == "phi3_chat"
    assert read_template(stated | {"model_type": "internvl_chat", "template": "internvl2_5"}) == "qwen_chat"


def test_public_names_carry_the_heads():
    assert public_names(INTERNLM2) == PublicNames("internlm2", kv_heads=2, groups=2)
    assert public_names(SIZES.language).language == "qwen2"
