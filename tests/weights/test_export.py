"""Exported tensors of networks of a few thousand weights, and of the recorded ones."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.conftest import SIZES
from tests.golden import NETWORKS
from transformers import AutoModelForCausalLM

from vessel.errors import VesselError
from vessel.model.lora import Lora, adapter_config, merged_state
from vessel.weights import export
from vessel.weights.architecture import public_names
from vessel.weights.digests import digests
from vessel.weights.entry import Weights
from vessel.weights.export import (
    exported_size,
    exported_state,
    read_back,
    trained_changes,
    write_layout,
    write_pth,
    write_weights,
)
from vessel.weights.files import open_pickle
from vessel.weights.hub_config import native_config, public_config
from vessel.weights.layouts import EXPORT_LAYOUTS
from vessel.weights.names import public_of_mmengine
from vessel.weights.recognition import open_source

FP32, BF16 = torch.float32, torch.bfloat16
INTERNLM2 = replace(SIZES, language=replace(SIZES.language, family="internlm2", rms_eps=1e-5, rope_factor=2.0))
FAMILIES = {"qwen2": SIZES, "internlm2": INTERNLM2}


def disturb(network, part=""):
    """Change every trained tensor whose name holds `part`, as training would."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and part in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return network


def write(folder, network, sizes, tokens, *, layout, dtype=FP32):
    """Write a folder that is recognised; return the digests of the tensors in memory."""
    folder.mkdir(exist_ok=True)
    if layout == "adapter":
        adapter_config(network, base=None, revision=None).save_pretrained(str(folder))
    else:
        make = public_config if layout == "sa2va" else native_config
        config = make(sizes, tokens, template="qwen_chat", dtype=dtype)
        (folder / "config.json").write_text(json.dumps(config))
    return write_layout(folder, network, public_names(sizes.language), layout=layout, dtype=dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("layout", ["sa2va", "native"])
@pytest.mark.parametrize("tokens", ["full", "new"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_merged_layout_loads_back_equal(plan, tmp_path, family, tokens, layout, dtype):
    sizes = FAMILIES[family]
    chosen = plan(sizes=sizes, lora=Lora(r=4, tokens=tokens), trainable="lora")
    network = disturb(chosen.build())
    write(tmp_path, network, sizes, chosen.tokens, layout=layout, dtype=dtype)
    plain = plan(sizes=sizes, trainable="nothing", weights=[Weights(str(tmp_path))]).build().state_dict()
    merged = {name: tensor.to(dtype) for name, tensor in merged_state(network)}
    assert plain.keys() == merged.keys()
    assert all(torch.equal(plain[name], merged[name].float()) for name in merged)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", ["full", "new"])
def test_an_adapter_on_its_base_equals_the_exported_network(plan, tmp_path, family, tokens):
    sizes = FAMILIES[family]
    base = plan(sizes=sizes)
    write(tmp_path / "base", base.build(), sizes, base.tokens, layout="sa2va")
    weights = [Weights(str(tmp_path / "base"))]
    adapted = {"sizes": sizes, "lora": Lora(r=4, tokens=tokens), "trainable": "lora"}
    network = disturb(plan(**adapted, weights=weights).build())
    in_memory = write(tmp_path / "adapter", network, sizes, base.tokens, layout="adapter")
    again = plan(**adapted, weights=[*weights, Weights(str(tmp_path / "adapter"))]).build()
    assert digests(again.state_dict().items()) == digests(network.state_dict().items())
    others = {name.split(".")[0] for name in load_file(tmp_path / "adapter/non_lora.safetensors")}
    assert others == {"mlp1", "grounding_encoder", "text_hidden_fcs"}
    assert in_memory.keys() == {name for file in ("adapter_model", "non_lora")
                                for name in load_file(tmp_path / f"adapter/{file}.safetensors")}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", ["full", "new", "frozen"])
def test_peft_itself_reads_the_adapter(plan, tmp_path, family, tokens):
    sizes = FAMILIES[family]
    chosen = plan(sizes=sizes)
    base = chosen.build()
    write(tmp_path / "base", base, sizes, chosen.tokens, layout="sa2va")
    weights = [Weights(str(tmp_path / "base"))]
    network = plan(sizes=sizes, lora=Lora(r=4, tokens=tokens), trainable="lora", weights=weights).build()
    write(tmp_path / "adapter", disturb(network), sizes, chosen.tokens, layout="adapter")
    # The language model of the base, alone, as transformers has it.
    language = AutoModelForCausalLM.from_config(base.mllm.config.text_config)
    language.model.load_state_dict(base.mllm.model.language_model.state_dict())
    language.lm_head.load_state_dict(base.mllm.lm_head.state_dict())
    peft = PeftModel.from_pretrained(language, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[3, 7, chosen.new_tokens.start, 40]])
    network.eval()
    with torch.no_grad():
        states = network.mllm.model.language_model(input_ids=ids).last_hidden_state
        ours, theirs = network.mllm.lm_head(states), peft(input_ids=ids).logits
        without = base.mllm.lm_head(base.mllm.model.language_model(input_ids=ids).last_hidden_state)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(without, theirs, atol=1e-2)


def test_the_base_of_an_adapter_is_a_hub_id_or_nothing(plan, tmp_path):
    network = plan(lora=Lora(r=4), trainable="lora").build()
    adapter_config(network, base=None, revision=None).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == ""
    config = adapter_config(network, base="owner/sa2va", revision="abc")
    assert (config.base_model_name_or_path, config.revision, config.task_type) == ("owner/sa2va", "abc", "CAUSAL_LM")


@pytest.mark.parametrize("lora", [Lora(r=0), Lora(r=4), Lora(r=4, tokens="new")])
def test_the_size_is_known_before_writing(plan, tmp_path, lora):
    chosen = plan(lora=lora, trainable="lora" if lora.r else "all")
    network = chosen.build()
    for layout in ("sa2va", "native", *(["adapter"] if lora.r else [])):
        folder = tmp_path / layout
        write(folder, network, SIZES, chosen.tokens, layout=layout, dtype=BF16)
        written = sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())
        assert exported_size(network, layout, BF16) == written
        assert exported_size(network, layout, FP32) == 2 * written


def test_shards_hold_every_tensor_once(plan, tmp_path):
    network = plan().build()
    state = dict(public_names(SIZES.language).to_public(exported_state(network, FP32)))
    in_memory = write_weights(tmp_path, state.items(), shard_bytes=200_000)
    (tmp_path / "config.json").write_text(
        json.dumps({"llm_config": {"num_attention_heads": 4, "num_key_value_heads": 2}})
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    read = dict(open_source(str(tmp_path)).files.read())
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert digests(read.items()) == in_memory


def test_one_shard_at_a_time_is_in_memory(plan, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(export, "save_file", lambda tensors, file, metadata: (
        sizes.append(sum(t.nbytes for t in tensors.values())), file.touch()
    ))  # fmt: skip
    state = list(exported_state(plan().build(), FP32))
    write_weights(tmp_path, iter(state), shard_bytes=100_000)
    largest = max(tensor.nbytes for _, tensor in state)
    assert sum(sizes) == sum(tensor.nbytes for _, tensor in state)
    assert max(sizes) <= max(100_000, largest)


def test_guard_W7_the_live_network_is_not_changed_by_an_export(plan, tmp_path):
    chosen = plan(lora=Lora(r=4), trainable="lora")
    network = disturb(chosen.build())
    before = digests(network.state_dict().items())
    for layout in EXPORT_LAYOUTS:
        write(tmp_path / layout, network, SIZES, chosen.tokens, layout=layout, dtype=BF16)
    write_pth(tmp_path / "whole.pth", network, public_names(SIZES.language), BF16)
    assert digests(network.state_dict().items()) == before


@pytest.mark.parametrize("lora", [Lora(r=0), Lora(r=4), Lora(r=4, tokens="new")])
def test_guard_W4_a_trained_group_that_equals_its_base_is_named(plan, lora):
    base = digests(exported_state(plan().build(), BF16))
    network = plan(lora=lora, trainable="lora" if lora.r else "decoder_only").build()

    def same():
        return [group for group, (old, new) in trained_changes(network, base, BF16).items() if old == new]

    groups = list(network.trainable_groups())
    assert same() == groups
    disturb(network, "mask_decoder")
    assert same() == [group for group in groups if group != "mask_decoder"]
    disturb(network)
    assert same() == []


def test_guard_W4_adapters_of_the_base_are_compared_as_adapters(plan):
    """Compare a run that continues with the adapters of another one."""
    network = disturb(plan(lora=Lora(r=4), trainable="lora").build())
    base = digests((name, tensor.to(BF16)) for name, tensor in network.state_dict().items())
    assert all(old == new for old, new in trained_changes(network, base, BF16).values())
    disturb(network, "lora_")
    assert [group for group, (old, new) in trained_changes(network, base, BF16).items() if old != new] == ["lora"]


@pytest.mark.parametrize("damage", ["flip", "drop", "swap"])
def test_guard_W4_a_damaged_tensor_is_named(plan, tmp_path, damage):
    chosen = plan()
    in_memory = write(tmp_path, chosen.build(), SIZES, chosen.tokens, layout="sa2va")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "text_hidden_fcs.2.bias"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        at = content.find(tensors[name].numpy().tobytes())
        content[at] ^= 1
        file.write_bytes(content)
    else:
        if damage == "drop":
            del tensors[name]
        else:
            tensors[name], tensors["mlp1.1.bias"] = tensors[name].flip(0), tensors["mlp1.1.bias"]
        export.save_file(tensors, file)
    cause = "missing" if damage == "drop" else "in memory"
    with pytest.raises(VesselError, match=rf"text_hidden_fcs\.2\.bias .*{cause}"):
        read_back(open_source(str(tmp_path)), public_names(SIZES.language), in_memory)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_file_is_a_bare_dict_under_the_training_codes_names(plan, tmp_path, family):
    sizes = FAMILIES[family]
    network = disturb(plan(sizes=sizes, lora=Lora(r=4), trainable="lora").build())
    names, file = public_names(sizes.language), tmp_path / "whole.pth"
    count = write_pth(file, network, names, BF16)
    content = torch.load(file, weights_only=True)
    assert {name.split(".")[0] for name in content} == {"mllm", "grounding_encoder", "text_hidden_fcs"}
    assert "grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.gamma" in content
    assert not [name for name in content if "g_weight" in name or "lora" in name]
    expected = dict(names.to_public(exported_state(network, BF16)))
    assert count == len(content)
    assert {public_of_mmengine(name): t for name, t in content.items()}.keys() == expected.keys()
    assert all(torch.equal(expected[public_of_mmengine(name)], tensor) for name, tensor in content.items())
    # A user starts from it.
    plain = plan(sizes=sizes, trainable="nothing", weights=[Weights(str(file))]).build().state_dict()
    assert all(torch.equal(plain[name], t.float()) for name, t in exported_state(network, BF16))


def test_a_damaged_training_file_is_refused(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "open_pickle", lambda file: open_pickle(_damaged(file)))
    with pytest.raises(VesselError, match=r"whole\.pth: .*mllm\.model\.language_model\.lm_head\.weight"):
        write_pth(tmp_path / "whole.pth", plan().build(), public_names(SIZES.language), FP32)


def _damaged(file):
    content = torch.load(file, weights_only=True)
    content["mllm.model.language_model.lm_head.weight"][3, 3] += 1
    torch.save(content, file)
    return file


def test_merged_names_are_those_of_a_network_without_adapters(plan):
    for tokens in ("full", "new"):
        adapted = plan(lora=Lora(r=4, tokens=tokens), trainable="lora").build()
        assert dict(merged_state(adapted)).keys() == plan().build().state_dict().keys()


@pytest.fixture(params=NETWORKS)
def golden(request, golden_network):
    return golden_network(request.param)


def test_the_recorded_networks_are_exported_as_they_were(golden, tmp_path):
    model = golden.model
    in_memory = write(tmp_path, model.network, model.sizes, model.prompt.token_ids, layout="sa2va")
    theirs = load_file(golden.folder / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys() == in_memory.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
