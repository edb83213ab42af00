"""Refusals of sources that do not fit: they name the remedy and change nothing."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from tests.weights.conftest import same
from tests.weights.layouts import (
    CONFIG,
    LANGUAGE_CONFIG,
    internvl_state,
    public_state,
    training_state,
    training_tree,
    write_folder,
    write_sa2va,
    write_sam2,
)

from vessel.errors import VesselError
from vessel.model.lora import Lora
from vessel.weights import load as loading
from vessel.weights.entry import Weights
from vessel.weights.names import PublicNames
from vessel.weights.recognition import open_source


def test_guard_W1_a_file_of_another_width_is_refused(network, load, tmp_path):
    wide = {name: torch.zeros(*(2 * s for s in t.shape)) for name, t in public_state(network).items()}
    with pytest.raises(VesselError, match=r"shape .*model="):
        load(write_folder(tmp_path, wide))


def test_guard_W1_parts_of_another_network_only_by_name_and_share(network, plan, load, tmp_path):
    folder = write_sa2va(tmp_path / "base", network)
    torch.manual_seed(5)
    other = public_state(plan(trainable="nothing").build())
    for name in other:
        if name.startswith(("language_model", "mlp1", "text_hidden_fcs")):
            other[name] = torch.zeros(*(2 * s for s in other[name].shape))
        else:
            other[name] += 1
    write_folder(tmp_path / "wide", other)
    entry = {"source": str(tmp_path / "wide"), "partial": ["grounding.mask_decoder"]}
    loaded, (_, report) = load(folder, entry)
    assert [module.module for module in report.modules] == ["grounding.mask_decoder"]
    assert report.left_out == len(other) - 131 + 2 * 2  # query, key and value of the one vision layer are one tensor
    assert not same(loaded, network, "sam_mask_decoder")
    assert same(loaded, network, "text_hidden_fcs")
    with pytest.raises(VesselError, match=r"0\.0% .*text_hidden_fcs.* 100\.0%"):
        load(folder, entry | {"partial": ["grounding.mask_decoder", "text_hidden_fcs"]})
    with pytest.raises(VesselError, match=r"partial=grounding\.decoder"):
        load(folder, entry | {"partial": ["grounding.decoder"]})


def test_guard_W1_a_stated_share_is_enough_and_less_is_not(network, load, tmp_path):
    folder = write_sa2va(tmp_path / "base", network)
    half = {name: tensor + 1 for name, tensor in public_state(network).items() if "text_hidden_fcs.2" not in name}
    entry = {"source": str(write_folder(tmp_path / "half", half)), "partial": ["text_hidden_fcs"]}
    loaded, _ = load(folder, entry | {"share": 0.5})  # the two layers are of one size
    state, before = loaded.state_dict(), network.state_dict()
    for name in ("text_hidden_fcs.0.weight", "text_hidden_fcs.0.bias"):
        assert torch.equal(state[name], before[name] + 1)
    for name in ("text_hidden_fcs.2.weight", "text_hidden_fcs.2.bias"):
        assert torch.equal(state[name], before[name])
    with pytest.raises(VesselError, match=r"50\.0% .*text_hidden_fcs.* 51\.0%"):
        load(folder, entry | {"share": 0.51})


def test_guard_W1_a_share_over_random_layers_keeps_what_was_loaded(network, load, internvl, sam2, tmp_path):
    weights = {name: tensor for name, tensor in public_state(network).items() if not name.endswith("s.0.bias")}
    folder = write_folder(tmp_path / "less", weights)
    entry = {"source": str(folder), "partial": ["text_hidden_fcs"], "share": 0.9}
    loaded, (*_, report) = load(internvl, sam2, entry)
    assert report.names("missing") == ["text_hidden_fcs.0.bias"]
    for name in report.names("loaded"):
        assert torch.equal(loaded.state_dict()[name], network.state_dict()[name])
    bias = loaded.text_hidden_fcs[0].bias.detach()
    assert 0 < float(bias.abs().max()) <= 32**-0.5  # as torch initialises it
    assert not torch.equal(bias, network.text_hidden_fcs[0].bias)


def test_guard_W1_by_name_there_is_nothing_more_either(network, load, tmp_path):
    base = write_sa2va(tmp_path / "base", network)
    more = write_folder(tmp_path / "more", {**public_state(network), "text_hidden_fcs.9.bias": torch.zeros(1)})
    for share in (1, 0.1):
        entry = {"source": str(more), "partial": ["text_hidden_fcs"], "share": share}
        with pytest.raises(VesselError, match=r"1 unexpected \(first: text_hidden_fcs\.9\.bias\)"):
            load(base, entry)


@pytest.mark.parametrize("partial", [[], ["grounding"], ["grounding.memory"], ["grounding.mask_decoder"]])
def test_guard_W2_sam_2_1_is_refused_by_name(network, load, internvl, tmp_path, partial):
    more = {"no_obj_embed_spatial": torch.zeros(1, 8), "obj_ptr_tpos_proj.weight": torch.zeros(8, 32)}
    file = write_sam2(tmp_path / "sam2.1.pt", network, **more)
    base = write_sa2va(tmp_path / "base", network) if partial else internvl
    with pytest.raises(VesselError, match=r"SAM 2\.1"):
        load(base, {"source": str(file), "partial": partial})


@pytest.mark.parametrize("lora", [Lora(r=0), Lora(r=8)], ids=["none", "another rank"])
def test_guard_W5_adapters_that_match_nothing_are_refused(network, load, tmp_path, lora):
    torch.save({"state_dict": training_state(training_tree(network, rank=4))}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"rank 4 .*lora\.r=4"):
        load(base, tmp_path / "iter.pth", lora=lora, trainable="lora")


def test_guard_W5_one_lost_adapter_is_enough_to_refuse(network, load, tmp_path):
    state = training_state(training_tree(network, rank=4))
    lost = next(name for name in state if "lora_B" in name)
    del state[lost]
    torch.save({"state_dict": state}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"1 missing \(first: .*lora_B"):
        load(base, tmp_path / "iter.pth", lora=Lora(r=4), trainable="lora")


def test_copies_of_the_tables_need_lora_tokens_full(network, load, tmp_path):
    torch.save({"state_dict": training_state(training_tree(network, rank=4))}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"lora\.tokens=full"):
        load(base, tmp_path / "iter.pth", lora=Lora(r=4, tokens="new"), trainable="lora")


def test_one_lost_or_added_tensor_is_enough_to_refuse(network, load, tmp_path):
    state = public_state(network)
    del state["text_hidden_fcs.0.bias"]
    with pytest.raises(VesselError, match=r"1 missing \(first: text_hidden_fcs\.0\.bias\)"):
        load(write_folder(tmp_path / "less", state))
    with pytest.raises(VesselError, match=r"1 unexpected \(first: text_hidden_fcs\.9\.bias\)"):
        load(write_folder(tmp_path / "more", {**public_state(network), "text_hidden_fcs.9.bias": torch.zeros(1)}))


def test_a_refused_source_changes_nothing(network, plan, tmp_path):
    state = {name: tensor + 1 for name, tensor in public_state(network).items()}
    del state["text_hidden_fcs.2.bias"]
    source = open_source(str(write_folder(tmp_path, state)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(VesselError, match="1 missing"):
        loading.load(network, source, PublicNames(), tokens=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_part_that_nothing_gives_is_an_error(network, load, prompt, tmp_path):
    write_folder(tmp_path / "vlm", internvl_state(network, prompt.new_tokens.start))
    with pytest.raises(VesselError, match=r"weights=.* grounding .*SAM 2\.0"):
        load(tmp_path / "vlm")


def test_names_of_no_sa2va_are_refused(load, tmp_path):
    with pytest.raises(VesselError, match=r" bert$"):
        load(write_folder(tmp_path, {"bert.encoder.weight": torch.zeros(1)}))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(VesselError, match=r"tensor: conv1\.weight"):
        load(tmp_path / "resnet.pth")


def test_an_absent_source_is_refused_with_the_remedy(load, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VesselError, match="hf://somebody/no-such-network"):
        load("somebody/no-such-network")


def test_plain_tables_of_a_training_file_are_refused_with_the_option(network, load, tmp_path):
    """Load a file of the first public training code, which saved embedding and head without peft's copies."""
    state = training_state(training_tree(network, rank=4))
    state = {name.replace(".modules_to_save.default.", "."): tensor for name, tensor in state.items()}
    torch.save({"state_dict": state}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"lora\.tokens=frozen"):
        load(base, tmp_path / "iter.pth", lora=Lora(r=4), trainable="lora")
    load(base, tmp_path / "iter.pth", lora=Lora(r=4, tokens="frozen"), trainable="lora")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_refused_by_name(network, load, tmp_path, value, dtype):
    state = public_state(network)
    state["text_hidden_fcs.2.weight"] = state["text_hidden_fcs.2.weight"].to(dtype)
    state["text_hidden_fcs.2.weight"][3, 5] = value
    with pytest.raises(VesselError, match=r"text_hidden_fcs\.2\.weight .*NaN"):
        load(write_folder(tmp_path, state))


def test_large_numbers_are_finite(network, load, tmp_path):
    """Load large numbers, though their sum is infinite."""
    state = public_state(network)
    state["text_hidden_fcs.2.weight"] = torch.full((32, 32), 3e38)
    load(write_folder(tmp_path, state))


def test_integers_are_no_weights(network, load, tmp_path):
    state = public_state(network)
    state["text_hidden_fcs.2.bias"] = torch.zeros(32, dtype=torch.int64)
    with pytest.raises(VesselError, match=r"text_hidden_fcs\.2\.bias: torch\.int64 for torch\.float32"):
        load(write_folder(tmp_path, state))


def test_two_tensors_of_one_name_are_refused(network, load, tmp_path):
    state = public_state(network)
    name = next(name for name in state if name.endswith(".g_weight"))
    state[name.replace(".g_weight", ".gamma")] = state[name] + 1
    with pytest.raises(VesselError, match=r"fuser\.layers\.0\.gamma twice"):
        load(write_folder(tmp_path, state))


def test_a_head_that_the_configuration_ties_is_refused_if_it_differs(network, load, tmp_path):
    tied = LANGUAGE_CONFIG | {"tie_word_embeddings": True}
    state = public_state(network)
    folder = write_folder(tmp_path / "two", state, llm_config=tied)
    with pytest.raises(VesselError, match=r"tie_word_embeddings.*untie: true.*partial: \[mllm, grounding"):
        load(folder)
    embedding = network.mllm.get_input_embeddings().weight
    loaded, _ = load({"source": str(folder), "untie": True})
    assert torch.equal(loaded.mllm.lm_head.weight, embedding)
    loaded, _ = load({"source": str(folder), "partial": ["mllm", "grounding", "text_hidden_fcs"]})
    assert same(loaded, network)
    state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"].clone()
    loaded, _ = load(write_folder(tmp_path / "one", state, llm_config=tied))
    assert torch.equal(loaded.mllm.lm_head.weight, embedding)


def test_a_tied_head_may_be_stated_at_the_top_alone(network, load, sam2, tmp_path):
    """Tie the head at the top level of config.json, as transformers 5 does."""
    network.mllm.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    state = {name: tensor.clone() for name, tensor in network.mllm.state_dict().items() if "lm_head" not in name}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VesselError, match=r"untie: true"):
        load(tmp_path, sam2)
    load({"source": str(tmp_path), "untie": True}, sam2)


# Recognising a source -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, {"model_type": "sam2_video"}], ids=["alone", "with another layout"])
def test_a_folder_with_one_sam2_file_stands_for_it(network, internvl, load, tmp_path, config):
    folder = tmp_path / "sam2-hiera-large"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"vision_encoder.weight": torch.zeros(1)}, folder / "model.safetensors")
    write_sam2(folder / "sam2_hiera_large.pt", network)
    loaded, (_, report) = load(internvl, folder)
    assert report.kind == "SAM 2.0 file"
    assert same(loaded, network, "grounding.")
    write_sam2(folder / "sam2_hiera_small.pt", network)
    with pytest.raises(VesselError, match=r"sam2_hiera_large\.pt, sam2_hiera_small\.pt.*: .*/sam2_hiera_large\.pt"):
        load(internvl, f"{folder}/")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_file_of_a_folder_is_not_taken_for_a_training_file(network, load, tmp_path, shards):
    base = write_sa2va(tmp_path, network, shards=shards)
    for file in base.glob("*.safetensors"):
        with pytest.raises(VesselError, match=f": {re.escape(str(tmp_path))}$"):
            load(base, file)
    (base / "config.json").unlink()
    with pytest.raises(VesselError, match=f": {re.escape(str(tmp_path))}$"):
        load(base / ("model.safetensors" if shards == 1 else "model-00001-of-00003.safetensors"))


@pytest.mark.parametrize(
    "heads", [{"num_key_value_heads": 0}, {"num_key_value_heads": 3}, {"num_attention_heads": "4"}]
)
def test_heads_that_cannot_be_are_refused(network, load, tmp_path, heads):
    with pytest.raises(VesselError, match=r"num_attention_heads=4 .*num_key_value_heads=[023]"):
        load(write_folder(tmp_path, public_state(network), llm_config=CONFIG["llm_config"] | heads))


def test_an_entry_of_the_wrong_type_is_refused():
    with pytest.raises(VesselError, match=r"partial=grounding\.mask_decoder .*partial: \[grounding\.mask_decoder\]"):
        Weights.listed([{"source": "a", "partial": "grounding.mask_decoder"}])
    with pytest.raises(VesselError, match=r"weights: source=5"):
        Weights.listed([{"source": 5}])
