"""Tables of names are bijections, and joined tensors are split as their layout requires."""

from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from tests.conftest import SIZES

from vessel.batch import TokenIds
from vessel.errors import VesselError
from vessel.model.sa2va import build_sa2va
from vessel.weights.architecture import language_family, public_names
from vessel.weights.names import (
    PublicNames,
    from_sam2,
    from_transformers,
    mmengine_of_public,
    public_of_mmengine,
    public_of_peft,
)

INTERNLM2 = replace(SIZES, language=replace(SIZES.language, family="internlm2"))
VIT_6B = replace(INTERNLM2, vision=replace(SIZES.vision, norm="rms_norm", qk_norm=True, qkv_bias=False))
# Two key heads of eight, two query heads for each, width 32.
NAMES = PublicNames("internlm2", kv_heads=2, groups=2)
WQKV = "language_model.model.layers.0.attention.wqkv"


def test_public_names_of_8b_are_the_published_list(shared, compose):
    keys = shared("reference/sa2va_internvl3_8b_keys.txt").read_text().split()
    sizes = compose("train", ["model=internvl3_8b"]).model
    with init_empty_weights(include_buffers=False):
        state = build_sa2va(sizes, TokenIds(151674, 151667, 151643, 151645)).state_dict()
    names = public_names(sizes.language)
    public = dict(names.to_public(state.items()))
    assert len(keys) == 1589
    assert sorted(public) == sorted(keys)
    back = dict(names.to_native(public.items()))
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in state.items()}


@pytest.mark.parametrize("sizes", [SIZES, INTERNLM2, VIT_6B], ids=["qwen2", "internlm2", "internlm2 and 6B"])
def test_public_names_go_there_and_back(plan, sizes):
    state = plan(sizes=sizes).build().state_dict()
    names = public_names(sizes.language)
    public = dict(names.to_public(state.items()))
    assert language_family(public) == sizes.language.family
    back = dict(names.to_native(public.items()))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    again = dict(names.to_public(back.items()))
    assert again.keys() == public.keys()
    assert all(torch.equal(again[name], public[name]) for name in public)


def test_internlm2_has_the_names_of_its_code(plan):
    public = dict(public_names(INTERNLM2.language).to_public(plan(sizes=INTERNLM2).build().state_dict().items()))
    layer = {name for name in public if name.startswith("language_model.model.layers.1.")}
    assert {name.split("layers.1.")[1] for name in layer} == {
        "attention.wqkv.weight", "attention.wo.weight", "feed_forward.w1.weight", "feed_forward.w2.weight",
        "feed_forward.w3.weight", "attention_norm.weight", "ffn_norm.weight",
    }  # fmt: skip
    assert {name for name in public if name.startswith("language_model.")} - layer >= {
        "language_model.model.tok_embeddings.weight", "language_model.model.norm.weight",
        "language_model.output.weight",
    }  # fmt: skip
    assert public[f"{WQKV}.weight"].shape == (64, 32)


def test_wqkv_holds_the_queries_key_and_value_of_each_key_head():
    """Split numbered rows: key head 0 has rows 0-31, its queries 0-15, its key 16-23, its value 24-31; then head 1."""
    rows = torch.arange(64.0)[:, None].expand(64, 32)
    parts = {name.split(".")[-2]: t[:, 0].tolist() for name, t in NAMES.to_native([(f"{WQKV}.weight", rows)])}
    assert parts == {
        "q_proj": [*range(16), *range(32, 48)],
        "k_proj": [*range(16, 24), *range(48, 56)],
        "v_proj": [*range(24, 32), *range(56, 64)],
    }


def test_an_adapter_of_wqkv_becomes_three_that_add_up_to_the_same():
    torch.manual_seed(0)
    weight, a, b = torch.randn(64, 32), torch.randn(4, 32), torch.randn(64, 4)
    merged = dict(NAMES.to_native([(f"{WQKV}.weight", weight + b @ a)]))
    adapter = [(f"{WQKV}.lora_A.default.weight", a), (f"{WQKV}.lora_B.default.weight", b)]
    apart = dict(NAMES.to_native([(f"{WQKV}.weight", weight), *adapter]))
    assert len(apart) == 9
    for name, expected in merged.items():
        module = name.removesuffix(".weight")
        adapted = apart[name] + apart[f"{module}.lora_B.default.weight"] @ apart[f"{module}.lora_A.default.weight"]
        assert torch.allclose(adapted, expected, atol=1e-5), name


def test_mmengine_names_go_there_and_back(plan):
    public = dict(PublicNames().to_public(plan().build().state_dict().items()))
    theirs = [mmengine_of_public(name) for name in public]
    assert len(set(theirs)) == len(public)
    assert not any("g_weight" in name for name in theirs)
    assert [public_of_mmengine(name) for name in theirs] == list(public)


def test_names_of_adapters_keep_the_module_that_they_adapt():
    layer = "model.layers.0.self_attn.q_proj"
    of_peft = public_of_peft(f"base_model.model.{layer}.lora_A.weight")
    of_mmengine = public_of_mmengine(f"mllm.model.language_model.base_model.model.{layer}.lora_A.default.weight")
    assert of_peft == of_mmengine == f"language_model.{layer}.lora_A.default.weight"
    saved = "language_model.lm_head.modules_to_save.default.weight"
    assert public_of_peft("base_model.model.lm_head.weight") == saved
    assert (
        public_of_mmengine("mllm.model.language_model.base_model.model.lm_head.modules_to_save.default.weight") == saved
    )


def test_names_of_transformers_and_of_sam2_are_those_of_the_parts(plan):
    network = plan().build()
    state = network.state_dict()
    assert {name for name, _ in from_transformers(network.mllm.state_dict().items())} == {
        name for name in state if name.startswith("mllm.")
    }
    assert {name for name, _ in from_sam2(network.grounding.state_dict().items())} == {
        name for name in state if name.startswith("grounding.")
    }


def test_a_name_of_no_part_is_an_error():
    with pytest.raises(VesselError, match=r"encoder\.weight"):
        list(PublicNames().to_native([("encoder.weight", torch.zeros(1))]))
