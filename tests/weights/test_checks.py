"""Checks before any tensor is read: order, sizes that no tensor shows, adapters, and trained rows of `[SEG]`."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import SIZES
from tests.weights.conftest import same
from tests.weights.layouts import (
    LANGUAGE_CONFIG,
    VISION_CONFIG,
    internvl_state,
    training_state,
    training_tree,
    write_folder,
    write_sa2va,
)

from vessel.errors import VesselError
from vessel.inference.loading import load_model
from vessel.model.lora import Lora, adapter_config, adapter_state
from vessel.weights.checks import check_sizes
from vessel.weights.digests import fingerprint
from vessel.weights.entry import Weights
from vessel.weights.recognition import open_source
from vessel.weights.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def write_adapter(folder, network, **settings):
    """Write a peft folder of rank 4; settings replace those of its configuration."""
    training_tree(network, rank=4).mllm.model.language_model.save_pretrained(folder)
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def write_run(file, network, sizes):
    """Write a checkpoint of a run in which everything trained, without adapters."""
    config = {"model": asdict(sizes), "lora": {"r": 0, "alpha_ratio": 2.0}}
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    base = {"fingerprint": fingerprint(network.state_dict().items())}
    torch.save({"state_dict": state, "vessel": {"config": config, "weights": [base]}}, file)
    return file


@pytest.mark.parametrize(
    ("part", "config", "message"),
    [
        ("llm_config", LANGUAGE_CONFIG | {"num_attention_heads": 2}, r"heads=4.* 2;"),
        ("llm_config", LANGUAGE_CONFIG | {"rope_theta": 5e7}, r"rope_theta=1000000\.0.* 50000000\.0;"),
        ("vision_config", VISION_CONFIG | {"num_attention_heads": 4}, r"vision\.heads=2.* 4;"),
    ],
)
def test_guard_W1_sizes_that_no_tensor_shows_are_compared(network, load, tmp_path, part, config, message):
    with pytest.raises(VesselError, match=message):
        load(write_sa2va(tmp_path, network, **{part: config}))


def test_guard_W3_a_training_checkpoint_is_no_base(network, load, tmp_path):
    torch.save({"state_dict": training_state(training_tree(network, rank=4))}, tmp_path / "iter.pth")
    with pytest.raises(VesselError, match=r"weights=\[BASE,.*iter\.pth\]"):
        load(tmp_path / "iter.pth", lora=Lora(r=4), trainable="lora")


def test_guard_W3_a_base_does_not_follow_what_was_trained_on_it(network, load, tmp_path):
    torch.save({"state_dict": training_state(training_tree(network, rank=4))}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"weights: .*overwrite mllm"):
        load(base, tmp_path / "iter.pth", base, lora=Lora(r=4), trainable="lora")


def test_guard_W5_adapters_of_another_scale_are_refused(network, load, tmp_path):
    """Refuse adapters at a scale that they were not trained at; no tensor shows alpha."""
    tree = training_tree(network, rank=4)
    tree.mllm.model.language_model.save_pretrained(tmp_path / "adapter")
    cfg = "model = dict(llm_lora=dict(lora_alpha=16, lora_dropout=0.05, r=4, type='peft.LoraConfig'))"
    torch.save({"state_dict": training_state(tree), "meta": {"cfg": cfg}}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"lora\.alpha_ratio=2"):
        load(base, tmp_path / "adapter", lora=Lora(r=4, alpha_ratio=1), trainable="lora")
    with pytest.raises(VesselError, match=r"lora\.alpha_ratio=4"):
        load(base, tmp_path / "iter.pth", lora=Lora(r=4), trainable="lora")


@pytest.mark.parametrize(
    "setting",
    [
        {"use_rslora": True}, {"use_dora": True}, {"peft_type": "VERA"}, {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"}, {"lora_bias": True}, {"bias": "all"}, {"fan_in_fan_out": True},
        {"alpha_pattern": {"q_proj": 8}}, {"not_yet_known": 1},
    ],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
def test_other_kinds_of_adapters_are_refused(network, load, tmp_path, setting):
    base, adapter = write_sa2va(tmp_path / "base", network), write_adapter(tmp_path / "adapter", network, **setting)
    [(key, value)] = setting.items()
    with pytest.raises(VesselError, match=re.escape(f"{key}={value};")):
        load(base, adapter, lora=Lora(r=4), trainable="lora")


@pytest.mark.parametrize("setting", [{"lora_alpha": None}, {"r": 0}])
def test_adapters_without_a_scale_are_refused(network, load, tmp_path, setting):
    base, adapter = write_sa2va(tmp_path / "base", network), write_adapter(tmp_path / "adapter", network, **setting)
    with pytest.raises(VesselError, match=r"adapter_config\.json .*lora_alpha=\w+ and r=\d;"):
        load(base, adapter, lora=Lora(r=4), trainable="lora")


def test_rows_of_other_tokens_are_refused(network, plan, load, prompt, tmp_path):
    base = write_sa2va(tmp_path / "base", network)
    trained = plan(lora=Lora(r=4, tokens="new"), trainable="lora").build()
    folder = tmp_path / "adapter"
    adapter_config(trained, base=None, revision=None).save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in adapter_state(trained)}, folder / ADAPTER_WEIGHTS)
    chosen = {"lora": Lora(r=4, tokens="new"), "trainable": "lora"}
    loaded, _ = load(base, folder, **chosen)
    assert same(loaded, trained, "trainable_tokens_delta")
    file = folder / ADAPTER_CONFIG
    rows = [row + 1 for row in prompt.new_tokens]
    indices = {"embed_tokens": list(prompt.new_tokens), "lm_head": rows}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(VesselError, match=rf"{re.escape(str(rows))}.*{re.escape(str(list(prompt.new_tokens)))}"):
        load(base, folder, **chosen)


def test_the_scale_of_adapters_that_are_not_taken_does_not_matter(network, load, tmp_path):
    cfg = "model = dict(llm_lora=dict(lora_alpha=16, r=4))"
    state = training_state(training_tree(network, rank=4))
    torch.save({"state_dict": state, "meta": {"cfg": cfg}}, tmp_path / "iter.pth")
    entry = {"source": str(tmp_path / "iter.pth"), "partial": ["grounding.mask_decoder"]}
    _, (_, report) = load(write_sa2va(tmp_path / "base", network), entry, lora=Lora(r=8), trainable="lora")
    assert [module.module for module in report.modules] == ["grounding.mask_decoder"]


def test_a_part_before_its_base_is_refused(network, load, tmp_path):
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"weights: .*overwrite"):
        load({"source": str(base), "partial": ["grounding.mask_decoder"]}, base)


@pytest.mark.parametrize("part", ["mllm", "mllm.language"])
@pytest.mark.parametrize("change", [{"num_attention_heads": 2}, {"rope_theta": 5e7}, {"num_hidden_layers": 3}])
def test_guard_W1_sizes_are_compared_for_modules_taken_by_name(network, load, tmp_path, part, change):
    base = write_sa2va(tmp_path / "base", network)
    other = write_sa2va(tmp_path / "other", network, llm_config=LANGUAGE_CONFIG | change)
    with pytest.raises(VesselError, match=r"model\.language\.\w+="):
        load(base, {"source": str(other), "partial": [part]})
    load(base, {"source": str(other), "partial": ["mllm.vision", "text_hidden_fcs"]})


def test_guard_W1_sizes_of_a_native_folder_are_compared(network, load, tmp_path):
    state = {name: tensor.clone().contiguous() for name, tensor in network.state_dict().items()}
    loaded, (report,) = load(write_folder(tmp_path / "same", state))
    assert report.kind == "vessel folder"
    assert same(loaded, network)
    with pytest.raises(VesselError, match=r"model\.language\.heads=4.* 2;"):
        load(write_folder(tmp_path / "other", state, llm_config=LANGUAGE_CONFIG | {"num_attention_heads": 2}))


@pytest.mark.parametrize(
    ("part", "change"),
    [("language", {"heads": 2}), ("vision", {"heads": 1}), ("grounding", {"windows": (4, 4, 2, 2)})],
)
def test_guard_W1_sizes_of_a_run_are_compared(network, load, tmp_path, part, change):
    base = write_sa2va(tmp_path / "base", network)
    loaded, _ = load(base, write_run(tmp_path / "same.ckpt", network, SIZES))
    assert same(loaded, network)
    sizes = replace(SIZES, **{part: replace(getattr(SIZES, part), **change)})
    run = write_run(tmp_path / "other.ckpt", network, sizes)
    with pytest.raises(VesselError, match=rf"model\.{part}\.{next(iter(change))}="):
        load(base, run)
    load(base, {"source": str(run), "partial": ["text_hidden_fcs"]})


@pytest.mark.parametrize(
    ("frame", "tile"), [(SIZES.grounding.frame_size, 56), (128, 56), (SIZES.grounding.frame_size, 112)]
)
def test_guard_W1_sizes_of_a_run_with_old_names_are_compared(network, load, tmp_path, frame, tile):
    saved = torch.load(write_run(tmp_path / "old.ckpt", network, SIZES), weights_only=True)
    model = saved["vessel"]["config"]["model"]
    for part, old, new, value in (("grounding", "frame", "frame_size", frame), ("vision", "tile", "tile_size", tile)):
        name = {"grounding": "vessel.model.grounding.GroundingSizes", "vision": "vessel.model.mllm.VisionSizes"}[part]
        del model[part][new]
        model[part] |= {"_target_": name, old: value}
    torch.save(saved, tmp_path / "old.ckpt")
    base = write_sa2va(tmp_path / "base", network)
    if (frame, tile) == (SIZES.grounding.frame_size, SIZES.vision.tile_size):
        loaded, _ = load(base, tmp_path / "old.ckpt")
        assert same(loaded, network)
        return
    wrong = "grounding.frame_size" if frame == 128 else "vision.tile_size"
    with pytest.raises(VesselError, match=re.escape(f"model.{wrong}=")):
        load(base, tmp_path / "old.ckpt")


def test_a_run_without_configuration_is_refused(network, load, tmp_path):
    torch.save({"state_dict": {"network.a": torch.zeros(1)}, "vessel": {}}, tmp_path / "a.ckpt")
    with pytest.raises(VesselError, match=r"a\.ckpt: .*config\.model"):
        load(write_sa2va(tmp_path / "base", network), tmp_path / "a.ckpt")


def test_guard_W4_a_later_base_does_not_overwrite_an_earlier_one(network, load, internvl, sam2, tmp_path):
    base, second = write_sa2va(tmp_path / "base", network), write_sa2va(tmp_path / "second", network)
    for later, modules in ((sam2, "grounding"), (internvl, "mllm"), (second, "mllm, grounding, text_hidden_fcs")):
        with pytest.raises(VesselError, match=rf"overwrite {modules} of {base}; "):
            load(base, later)
    with pytest.raises(VesselError, match="overwrite mllm"):
        load(internvl, sam2, base)
    load(sam2, internvl)
    load(base, {"source": str(sam2), "partial": ["grounding.image_encoder"]})


def test_a_part_of_a_base_after_what_was_trained_is_refused(network, load, tmp_path):
    """Refuse the part: bases are loaded first, so it would not overwrite the trained weights, as the list states."""
    torch.save({"state_dict": training_state(training_tree(network, rank=4))}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    part = {"source": str(base), "partial": ["grounding.mask_decoder"]}
    with pytest.raises(VesselError, match=r"weights: .*overwrite.*iter\.pth"):
        load(base, tmp_path / "iter.pth", part, lora=Lora(r=4), trainable="lora")


@pytest.fixture
def seg(plan, internvl, sam2):
    """Return a function: True if `[SEG]` is trained after sources on top of an InternVL and a SAM 2.0."""

    def known(*sources, base=(internvl, sam2), tokens="full"):
        weights = Weights.listed([s if isinstance(s, dict) else str(s) for s in (*base, *sources)])
        made = plan(weights=weights, lora=Lora(r=4, tokens=tokens), trainable="lora")
        made.build()
        return made.seg_is_trained

    return known


def test_guard_T3_seg_is_untrained_after_a_source_without_its_rows(network, seg, tmp_path):
    state = training_state(training_tree(network, rank=4))
    torch.save({"state_dict": state}, tmp_path / "all.pth")
    without = {name: tensor for name, tensor in state.items() if "mask_decoder" in name or "text_hidden" in name}
    torch.save({"state_dict": without}, tmp_path / "decoder.pth")
    assert not seg()
    assert not seg(tmp_path / "decoder.pth")
    assert seg(tmp_path / "all.pth")
    with pytest.raises(VesselError, match=r"lora\.tokens=frozen .*\[SEG\]"):
        seg(tmp_path / "decoder.pth", tokens="frozen")
    sa2va = write_sa2va(tmp_path / "sa2va", network)
    assert seg(tmp_path / "decoder.pth", base=[sa2va], tokens="frozen")


def test_guard_T3_rows_are_known_by_the_part_that_holds_them(network, seg, internvl, tmp_path):
    sa2va = write_sa2va(tmp_path / "sa2va", network)
    assert seg({"source": str(sa2va), "partial": ["mllm.tokens"]}, tokens="frozen")
    assert not seg({"source": str(sa2va), "partial": ["grounding.mask_decoder"]})
    # A base vocabulary leaves the added rows alone; one padded to all rows replaces them.
    tokens = {"partial": ["mllm.tokens"]}
    assert seg(tokens | {"source": str(internvl), "share": 0.7}, base=[sa2va])
    padded = write_folder(tmp_path / "padded", internvl_state(network, SIZES.language.vocabulary))
    assert not seg(tokens | {"source": str(padded)}, base=[sa2va])


def test_guard_W1_a_real_run_states_its_sizes(tiny_run):
    model = load_model(str(tiny_run))
    source = open_source(str(model.source))
    check_sizes(source, model.sizes)
    other = replace(model.sizes, language=replace(model.sizes.language, rope_theta=1e4))
    with pytest.raises(VesselError, match=r"model\.language\.rope_theta=10000\.0.* 1000000\.0;"):
        check_sizes(source, other)
