"""Weights out, on networks of a few thousand weights."""

import json

import pytest
import torch

from vessel.model.hub import exported_size, exported_state, public_config, unchanged_groups, write_weights
from vessel.model.lora import Lora, merged_state
from vessel.model.plan import NetworkPlan
from vessel.model.weights import digests, load_state, read_safetensors, to_native

FP32, BF16 = torch.float32, torch.bfloat16


def disturb(network, part):
    """Change every trained tensor whose name holds `part`, as training would."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and part in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("tokens", ["full", "new"])
def test_adapters_vanish_and_the_network_stays_the_same(plan, make_batch, tmp_path, tokens):
    network = disturb(plan(lora=Lora(r=4, tokens=tokens), trainable="lora").build(), "").eval()
    write_weights(tmp_path, exported_state(network, FP32))
    plain = plan().build().eval()
    load_state(plain, to_native(read_safetensors(tmp_path)), "export").require_complete()
    batch = make_batch([["lumen"], ["lumen", "cap"]])
    with torch.no_grad():
        assert torch.allclose(network(batch).mask_logits, plain(batch).mask_logits, atol=1e-4)


@pytest.mark.parametrize("lora", [Lora(r=0), Lora(r=4), Lora(r=4, tokens="new")])
def test_the_size_is_known_before(plan, lora):
    network = plan(lora=lora).build()
    written = sum(tensor.nbytes for _, tensor in exported_state(network, BF16))
    assert exported_size(network, BF16) == written
    assert exported_size(network, FP32) == 2 * written


def test_shards_hold_every_tensor_once(plan, tmp_path):
    network = plan().build()
    state = dict(exported_state(network, FP32))
    in_memory = write_weights(tmp_path, state.items(), shard_bytes=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    read = dict(read_safetensors(tmp_path))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert digests(read.items()) == in_memory


def test_guard_W7_the_live_network_is_not_changed_by_an_export(plan, tmp_path):
    network = disturb(plan(lora=Lora(r=4), trainable="lora").build(), "")
    before = digests(network.state_dict().items())
    write_weights(tmp_path, exported_state(network, BF16))
    assert digests(network.state_dict().items()) == before


@pytest.mark.parametrize("lora", [Lora(r=0), Lora(r=4), Lora(r=4, tokens="new")])
def test_guard_W4_a_trained_group_that_equals_its_base_is_named(plan, lora):
    base = dict(exported_state(plan().build(), FP32))
    chosen: NetworkPlan = plan(lora=lora, trainable="lora" if lora.r else "decoder_only")
    network = chosen.build()
    groups = list(network.trainable_groups())
    same = unchanged_groups(network, exported_state(network, BF16), base.items(), BF16)
    assert same == groups
    disturb(network, "mask_decoder")
    same = unchanged_groups(network, exported_state(network, BF16), base.items(), BF16)
    assert same == [group for group in groups if group != "mask_decoder"]
    disturb(network, "")
    assert unchanged_groups(network, exported_state(network, BF16), base.items(), BF16) == []


def test_merged_names_are_those_of_a_network_without_adapters(plan):
    adapted = plan(lora=Lora(r=4), trainable="lora").build()
    assert dict(merged_state(adapted)).keys() == plan().build().state_dict().keys()


def test_config_says_what_the_public_one_says(plan, shared):
    network_plan = plan()
    ours = public_config(network_plan.build(), template="qwen_chat", views=network_plan.sizes.views, dtype="bf16")
    public = json.loads(shared("golden/sa2va_qwen2/config.json").read_text())
    assert ours.keys() <= public.keys()
    for part in ("llm_config", "vision_config"):
        assert ours[part].keys() <= public[part].keys()
        fixed = [
            k
            for k, v in public[part].items()
            if isinstance(v, bool) or k in ("model_type", "architectures", "hidden_act")
        ]
        assert {k: ours[part][k] for k in fixed if k in ours[part]} == {
            k: public[part][k] for k in fixed if k in ours[part]
        }
    for key in (
        "architectures",
        "model_type",
        "auto_map",
        "ps_version",
        "select_layer",
        "downsample_ratio",
        "template",
    ):
        assert ours[key] == public[key]
