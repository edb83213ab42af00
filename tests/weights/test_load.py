"""Every kind of source is loaded exactly, with a report by module, or refused with the remedy."""

import io
import json

import pytest
import torch
from tests.weights.conftest import same
from tests.weights.layouts import (
    LANGUAGE_CONFIG,
    LINEAR,
    internvl_state,
    public_state,
    training_state,
    training_tree,
    write_folder,
    write_sa2va,
    write_sam2,
    write_transformers,
)

from vessel.errors import VesselError
from vessel.model.lora import Lora, merged_state
from vessel.weights.digests import fingerprint
from vessel.weights.entry import Weights
from vessel.weights.recognition import open_source


@pytest.mark.parametrize("shards", [1, 4])
def test_a_sa2va_folder_gives_every_tensor(network, load, tmp_path, shards):
    loaded, (report,) = load(write_sa2va(tmp_path, network, shards=shards))
    assert same(loaded, network)
    assert {m.module: m.fraction for m in report.modules} == dict.fromkeys(
        [
            "mllm.vision", "mllm.projector", "mllm.language", "mllm.tokens", "grounding.image_encoder",
            "grounding.memory", "grounding.prompt_encoder", "grounding.mask_decoder", "text_hidden_fcs",
        ],
        1.0,
    )  # fmt: skip
    assert len(report.names("loaded")) == len(network.state_dict())
    assert report.fingerprint == fingerprint(network.state_dict().items())
    assert report.kind == "Sa2VA folder"


def test_kinds_are_recognised_by_content_not_by_name(network, load, tmp_path):
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
    # New rows are initialised like any embedding, not from the mean of the others.
    fresh = embedding[base : prompt.new_tokens.stop]
    assert 0.5 < float(fresh.detach().std()) * 32**0.5 < 2
    assert not torch.equal(fresh, network.mllm.get_input_embeddings().weight[base : prompt.new_tokens.stop])


def test_guard_T6_resizing_needs_no_second_table(network, load, prompt, tmp_path, monkeypatch):
    """Load without transformers' resize, which takes the mean over all rows."""

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
    tree = training_tree(network, rank=4)
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
    assert not report.names("missing")
    assert {m.fraction for m in report.modules if m.module != "grounding.prompt_encoder"} == {1.0}
    # The merged network has the logits of peft's own module.
    language = tree.mllm.model.language_model.eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = language(input_ids=ids).logits
        ours = loaded.mllm(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    merged = dict(merged_state(loaded))
    assert torch.equal(merged["text_hidden_fcs.0.bias"], tree.text_hidden_fcs[0].bias)


def test_true_keys_of_a_training_pth_are_535(shared, compose):
    """Count by the published grammar: 14 a layer, two copies, the projector, the mask decoder and the projection."""
    keys = shared("reference/sa2va_internvl3_8b_keys.txt").read_text().split()
    decoder = [key for key in keys if "sam_mask_decoder" in key]
    rest = [key for key in keys if key.startswith(("mlp1.", "text_hidden_fcs."))]
    layers = {key.split(".")[3] for key in keys if key.startswith("language_model.model.layers.")}
    assert len(LINEAR) * 2 * len(layers) + 2 + len(decoder) + len(rest) == 535


def test_peft_adapter_on_its_base(network, load, tmp_path):
    tree = training_tree(network, rank=4)
    language = tree.mllm.model.language_model.eval()
    language.save_pretrained(tmp_path / "adapter")
    folder = write_sa2va(tmp_path / "base", network)
    loaded, (_, report) = load(folder, tmp_path / "adapter", lora=Lora(r=4, dropout=0.0), trainable="lora")
    assert report.kind == "adapter folder"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.mllm(input_ids=ids).logits, language(input_ids=ids).logits, atol=1e-5)


def test_an_unknown_field_of_an_entry_is_refused():
    with pytest.raises(VesselError, match=r"strict.*source, revision, partial, share, untie"):
        Weights.listed([{"source": "a", "strict": False}])
    with pytest.raises(VesselError, match="share=0"):
        Weights("a", partial=["grounding"], share=0)
    with pytest.raises(VesselError, match=r"share=0\.5 .*partial"):
        Weights("a", share=0.5)


def test_fingerprint_depends_on_names_values_and_dtypes_but_not_on_order():
    one, two = ("a", torch.ones(2)), ("b", torch.zeros(2))
    assert fingerprint([one, two]) == fingerprint([two, one])
    changed = [("c", torch.zeros(2)), ("b", torch.tensor([0, 1e-9])), ("b", torch.zeros(2).half())]
    assert len({fingerprint([one, other]) for other in [two, *changed]}) == 4


def test_report_has_plain_values_for_the_manifest_and_a_table_to_print(network, load, tmp_path):
    from rich.console import Console

    _, (report,) = load(write_sa2va(tmp_path, network))
    summary = json.loads(json.dumps(report.summary()))
    assert summary["modules"][0]["loaded"] > 0
    console = Console(width=120, file=io.StringIO())
    console.print(report.table())
    printed = console.file.getvalue()
    assert "grounding.mask_decoder" in printed
    assert "100.00%" in printed
    assert report.fingerprint in printed
