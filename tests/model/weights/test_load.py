"""Every kind of source into a network: exact, told module by module, or refused with the remedy."""

import io
import json

import pytest
import torch
from tests.model.layouts import (
    LANGUAGE_CONFIG,
    LINEAR,
    VISION_CONFIG,
    as_training_code_holds_it,
    internvl_state,
    public_state,
    training_state,
    write_folder,
    write_sa2va,
    write_sam2,
    write_transformers,
)

from vessel.errors import VesselError
from vessel.model.lora import Lora, merged_state
from vessel.model.weights import load as loading
from vessel.model.weights.digests import fingerprint
from vessel.model.weights.entry import Weights
from vessel.model.weights.names import PublicNames
from vessel.model.weights.sources import open_source


@pytest.fixture
def network(plan):
    """A network whose weights the sources hold."""
    return plan().build().eval()


@pytest.fixture
def load(plan):
    """Build from sources: `load("folder", {"source": ..., "partial": [...]}, lora=...)` gives network and reports."""

    def build(*sources, **changes):
        made = plan(weights=Weights.listed([s if isinstance(s, dict) else str(s) for s in sources]), **changes)
        return made.build().eval(), made.reports

    return build


def same(one, two, part=""):
    """Whether all tensors whose name holds `part` are equal; at least one must be there."""
    state, other = one.state_dict(), two.state_dict()
    names = [name for name in other if part in name]
    return bool(names) and all(torch.equal(state[name], other[name]) for name in names)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_sa2va_folder_gives_every_tensor(network, load, tmp_path, shards):
    loaded, (report,) = load(write_sa2va(tmp_path, network, shards=shards))
    assert same(loaded, network)
    assert {m.module: m.share for m in report.modules} == dict.fromkeys(
        [
            "mllm.vision", "mllm.projector", "mllm.language", "mllm.tokens", "grounding.image_encoder",
            "grounding.memory", "grounding.prompt_encoder", "grounding.mask_decoder", "text_hidden_fcs",
        ],
        1.0,
    )  # fmt: skip
    assert len(report.all("loaded")) == len(network.state_dict())
    assert report.fingerprint == fingerprint(network.state_dict().items())
    assert report.kind == "Sa2VA folder"


def test_kinds_are_told_by_content_not_by_name(network, load, tmp_path):
    write_sa2va(tmp_path / "sam2_hiera_large.pt", network)
    renamed = write_sam2(tmp_path / "model.safetensors", network)
    assert open_source(str(tmp_path / "sam2_hiera_large.pt")).kind.name == "Sa2VA folder"
    assert open_source(str(renamed)).kind.name == "SAM 2.0 file"


@pytest.mark.parametrize("layout", ["original", "transformers", "transformers, old names"])
def test_internvl_and_sam2_make_a_sa2va_whose_projection_is_new(network, load, prompt, tmp_path, layout):
    base = prompt.new_tokens.start
    if layout == "original":
        write_folder(tmp_path / "vlm", internvl_state(network, base))
    else:
        write_transformers(tmp_path / "vlm", network, old_names="old" in layout)
    loaded, reports = load(tmp_path / "vlm", write_sam2(tmp_path / "sam2.pt", network))
    assert [report.kind for report in reports] == ["InternVL folder", "SAM 2.0 file"]
    assert same(loaded, network, "vision_tower")
    assert same(loaded, network, "multi_modal_projector")
    assert same(loaded, network, "language_model.layers")
    assert same(loaded, network, "grounding.")
    assert not same(loaded, network, "text_hidden_fcs")
    assert all(torch.isfinite(p).all() and not p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize("padding", [0, 7])
def test_added_tokens_are_appended_to_a_base_vocabulary(network, load, prompt, tmp_path, padding):
    base = prompt.new_tokens.start
    state = internvl_state(network, base + padding)
    write_folder(tmp_path / "vlm", state)
    loaded, (report, _) = load(tmp_path / "vlm", write_sam2(tmp_path / "sam2.pt", network))
    embedding = loaded.mllm.get_input_embeddings().weight
    assert embedding.shape == network.mllm.get_input_embeddings().weight.shape
    assert torch.equal(embedding[:base], network.mllm.get_input_embeddings().weight[:base])
    assert report.grown == base + padding
    # Fresh rows are drawn like any embedding, not from the mean of the others.
    fresh = embedding[base : prompt.new_tokens.stop]
    assert 0.5 < float(fresh.detach().std()) * 32**0.5 < 2
    assert not torch.equal(fresh, network.mllm.get_input_embeddings().weight[base : prompt.new_tokens.stop])


def test_guard_T6_resizing_needs_no_second_table(network, load, prompt, tmp_path, monkeypatch):
    """transformers' resize, with its mean over all rows, is never called."""

    def resize(*_, **__):
        raise AssertionError("resize_token_embeddings")

    monkeypatch.setattr("transformers.PreTrainedModel.resize_token_embeddings", resize)
    write_folder(tmp_path / "vlm", internvl_state(network, prompt.new_tokens.start))
    load(tmp_path / "vlm", write_sam2(tmp_path / "sam2.pt", network))


def test_a_head_tied_to_the_embedding_is_refused_and_untied_on_demand(network, load, prompt, tmp_path):
    state = internvl_state(network, prompt.new_tokens.start)
    del state["language_model.lm_head.weight"]
    config = LANGUAGE_CONFIG | {"tie_word_embeddings": True}
    folder, sam2 = write_folder(tmp_path / "vlm", state, llm_config=config), write_sam2(tmp_path / "s.pt", network)
    with pytest.raises(VesselError, match="untie: true"):
        load(folder, sam2)
    loaded, _ = load({"source": str(folder), "untie": True}, sam2)
    rows = prompt.new_tokens.start
    assert torch.equal(loaded.mllm.lm_head.weight[:rows], loaded.mllm.get_input_embeddings().weight[:rows])
    assert loaded.mllm.lm_head.weight is not loaded.mllm.get_input_embeddings().weight


def test_full_pth_of_the_public_code(network, load, tmp_path):
    state = {}
    for name, tensor in public_state(network).items():
        prefix = "" if name.startswith(("grounding_encoder", "text_hidden_fcs")) else "mllm.model."
        state[prefix + name.replace(".g_weight", ".gamma")] = tensor
    torch.save(state, tmp_path / "full.pth")
    loaded, (report,) = load(tmp_path / "full.pth")
    assert same(loaded, network)
    assert report.kind == "full .pth of the public code"


@pytest.mark.parametrize("buffer", [False, True], ids=["535", "536"])
def test_training_pth_on_its_base(network, plan, load, tmp_path, buffer):
    tree = as_training_code_holds_it(network, rank=4)
    with torch.no_grad():
        for name, parameter in tree.named_parameters():
            if name in training_state(tree):
                parameter += 0.01
    state = training_state(tree)
    if buffer:
        matrix = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
        state[f"grounding_encoder.sam2_model.{matrix}"] = network.grounding.state_dict()[matrix]
    assert len(state) == 14 * 2 + 2 + 6 + 131 + 4 + buffer
    torch.save({"state_dict": state, "meta": {"iter": 1}}, tmp_path / "iter_1.pth")
    folder = write_sa2va(tmp_path / "base", plan().build())
    loaded, (_, report) = load(folder, tmp_path / "iter_1.pth", lora=Lora(r=4, dropout=0.0), trainable="lora")
    assert report.kind == "training .pth of the public code"
    assert not report.all("missing")
    assert {m.share for m in report.modules if m.module != "grounding.prompt_encoder"} == {1.0}
    # The merged network answers as peft's own module does.
    language = tree.mllm.model.language_model.eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = language(input_ids=ids).logits
        ours = loaded.mllm(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    merged = dict(merged_state(loaded))
    assert torch.equal(merged["text_hidden_fcs.0.bias"], tree.text_hidden_fcs[0].bias)


def test_true_keys_of_a_training_pth_are_535(shared, compose):
    """By the published grammar: 14 a layer, the two copies, the projector, the mask decoder and the projection."""
    keys = shared("reference/sa2va_internvl3_8b_keys.txt").read_text().split()
    decoder = [key for key in keys if "sam_mask_decoder" in key]
    rest = [key for key in keys if key.startswith(("mlp1.", "text_hidden_fcs."))]
    layers = {key.split(".")[3] for key in keys if key.startswith("language_model.model.layers.")}
    assert len(LINEAR) * 2 * len(layers) + 2 + len(decoder) + len(rest) == 535


def test_peft_adapter_on_its_base(network, load, tmp_path):
    tree = as_training_code_holds_it(network, rank=4)
    language = tree.mllm.model.language_model.eval()
    language.save_pretrained(tmp_path / "adapter")
    folder = write_sa2va(tmp_path / "base", network)
    loaded, (_, report) = load(folder, tmp_path / "adapter", lora=Lora(r=4, dropout=0.0), trainable="lora")
    assert report.kind == "adapter folder"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.mllm(input_ids=ids).logits, language(input_ids=ids).logits, atol=1e-5)


# What must be refused ------------------------------------------------------------------------------------------------


def test_guard_W1_a_file_of_another_width_is_refused(network, load, tmp_path):
    wide = {name: torch.zeros(*(2 * s for s in t.shape)) for name, t in public_state(network).items()}
    with pytest.raises(VesselError, match=r"does not fit this network: .* of another shape .*Choose the model="):
        load(write_folder(tmp_path, wide))


@pytest.mark.parametrize(
    ("part", "config", "told"),
    [
        ("llm_config", LANGUAGE_CONFIG | {"num_attention_heads": 2}, r"heads is 4 here and 2 there"),
        ("llm_config", LANGUAGE_CONFIG | {"rope_theta": 5e7}, r"rope_theta is 1000000\.0 here and 50000000\.0 there"),
        ("vision_config", VISION_CONFIG | {"num_attention_heads": 4}, r"vision\.heads is 2 here and 4 there"),
    ],
)
def test_guard_W1_sizes_that_no_tensor_shows_are_compared(network, load, tmp_path, part, config, told):
    with pytest.raises(VesselError, match=told):
        load(write_sa2va(tmp_path, network, **{part: config}))


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
    with pytest.raises(VesselError, match=r"0.0% of the elements of text_hidden_fcs fit, 100.0% are asked for"):
        load(folder, entry | {"partial": ["grounding.mask_decoder", "text_hidden_fcs"]})
    with pytest.raises(VesselError, match=r"partial=grounding\.decoder is no module"):
        load(folder, entry | {"partial": ["grounding.decoder"]})


def test_guard_W1_a_stated_share_is_enough_and_less_is_not(network, load, tmp_path):
    folder = write_sa2va(tmp_path / "base", network)
    half = public_state(network)
    for name in [n for n in half if n.startswith("text_hidden_fcs.2")]:
        del half[name]
    write_folder(tmp_path / "half", half)
    entry = {"source": str(tmp_path / "half"), "partial": ["text_hidden_fcs"]}
    elements = 32 * 32 + 32
    share = elements / (2 * elements)
    load(folder, entry | {"share": share})
    with pytest.raises(VesselError, match=r"50.0% of the elements of text_hidden_fcs fit, 51.0%"):
        load(folder, entry | {"share": 0.51})


def test_guard_W2_sam_2_1_is_refused_by_name(network, load, tmp_path):
    more = {"no_obj_embed_spatial": torch.zeros(1, 8), "obj_ptr_tpos_proj.weight": torch.zeros(8, 32)}
    folder = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"SAM 2\.1, and Sa2VA is built on SAM 2\.0"):
        load(folder, write_sam2(tmp_path / "sam2.1.pt", network, **more))


def test_guard_W3_a_training_checkpoint_is_no_base(network, load, tmp_path):
    torch.save({"state_dict": training_state(as_training_code_holds_it(network, rank=4))}, tmp_path / "iter.pth")
    with pytest.raises(VesselError, match=r"holds only what trained, so its base must come before it: weights=\[BASE,"):
        load(tmp_path / "iter.pth", lora=Lora(r=4), trainable="lora")


def test_guard_W3_a_base_does_not_follow_what_was_trained_on_it(network, load, tmp_path):
    torch.save({"state_dict": training_state(as_training_code_holds_it(network, rank=4))}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match="would undo"):
        load(base, tmp_path / "iter.pth", base, lora=Lora(r=4), trainable="lora")


@pytest.mark.parametrize("lora", [Lora(r=0), Lora(r=8)], ids=["none", "another rank"])
def test_guard_W5_adapters_that_match_nothing_are_refused(network, load, tmp_path, lora):
    torch.save({"state_dict": training_state(as_training_code_holds_it(network, rank=4))}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"adapters of rank 4 have no place .*choose lora\.r=4"):
        load(base, tmp_path / "iter.pth", lora=lora, trainable="lora")


def test_guard_W5_one_lost_adapter_is_enough_to_refuse(network, load, tmp_path):
    state = training_state(as_training_code_holds_it(network, rank=4))
    lost = next(name for name in state if "lora_B" in name)
    del state[lost]
    torch.save({"state_dict": state}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"1 missing \(first: .*lora_B"):
        load(base, tmp_path / "iter.pth", lora=Lora(r=4), trainable="lora")


def test_guard_W5_adapters_of_another_scale_are_refused(network, load, tmp_path):
    """Alpha is in no tensor: adapters would be taken at a scale that they were not trained at."""
    tree = as_training_code_holds_it(network, rank=4)
    tree.mllm.model.language_model.save_pretrained(tmp_path / "adapter")
    cfg = "model = dict(llm_lora=dict(lora_alpha=16, lora_dropout=0.05, r=4, type='peft.LoraConfig'))"
    torch.save({"state_dict": training_state(tree), "meta": {"cfg": cfg}}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"alpha = 2 r, here it is 1 r; choose lora\.alpha_ratio=2"):
        load(base, tmp_path / "adapter", lora=Lora(r=4, alpha_ratio=1), trainable="lora")
    with pytest.raises(VesselError, match=r"alpha = 4 r, here it is 2 r; choose lora\.alpha_ratio=4"):
        load(base, tmp_path / "iter.pth", lora=Lora(r=4), trainable="lora")


def test_other_kinds_of_adapters_are_refused(network, load, tmp_path):
    as_training_code_holds_it(network, rank=4).mllm.model.language_model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    with pytest.raises(VesselError, match="use_rslora=True; vessel reads plain LoRA"):
        load(write_sa2va(tmp_path / "base", network), tmp_path / "adapter", lora=Lora(r=4), trainable="lora")


def test_copies_of_the_tables_need_a_place(network, load, tmp_path):
    torch.save({"state_dict": training_state(as_training_code_holds_it(network, rank=4))}, tmp_path / "iter.pth")
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match=r"choose lora\.tokens=full"):
        load(base, tmp_path / "iter.pth", lora=Lora(r=4, tokens="new"), trainable="lora")


def test_a_part_before_its_base_is_refused(network, load, tmp_path):
    base = write_sa2va(tmp_path / "base", network)
    with pytest.raises(VesselError, match="would undo"):
        load({"source": str(base), "partial": ["grounding.mask_decoder"]}, base)


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
    with pytest.raises(VesselError, match=r"nothing gives grounding .*SAM 2\.0 file"):
        load(tmp_path / "vlm")


def test_names_of_no_sa2va_are_refused(load, tmp_path):
    with pytest.raises(VesselError, match="neither a Sa2VA nor an InternVL"):
        load(write_folder(tmp_path, {"bert.encoder.weight": torch.zeros(1)}))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(VesselError, match="weights of no kind that vessel knows"):
        load(tmp_path / "resnet.pth")


def test_an_absent_source_is_refused_with_the_remedy(load, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VesselError, match="check the spelling"):
        load("somebody/no-such-network")


def test_an_unknown_field_of_an_entry_is_refused():
    with pytest.raises(VesselError, match="source, revision, partial, share, untie"):
        Weights.listed([{"source": "a", "strict": False}])
    with pytest.raises(VesselError, match="share=0"):
        Weights("a", partial=["grounding"], share=0)
    with pytest.raises(VesselError, match=r"only with partial"):
        Weights("a", share=0.5)


def test_fingerprint_sees_names_values_and_dtypes_but_not_order():
    one, two = ("a", torch.ones(2)), ("b", torch.zeros(2))
    assert fingerprint([one, two]) == fingerprint([two, one])
    changed = [("c", torch.zeros(2)), ("b", torch.tensor([0, 1e-9])), ("b", torch.zeros(2).half())]
    assert len({fingerprint([one, other]) for other in [two, *changed]}) == 4


def test_report_is_plain_for_the_manifest_and_readable_for_people(network, load, tmp_path):
    from rich.console import Console

    _, (report,) = load(write_sa2va(tmp_path, network))
    summary = json.loads(json.dumps(report.summary()))
    assert summary["modules"][0]["loaded"] > 0
    console = Console(width=120, file=io.StringIO())
    console.print(report.table())
    told = console.file.getvalue()
    assert "grounding.mask_decoder" in told
    assert "100.00%" in told
    assert report.fingerprint in told
