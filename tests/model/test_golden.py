"""vessel gives the recorded outputs of the public code with its own weights, of both code generations."""

import pytest
import torch
from tests.golden import INTERNLM2, NETWORKS, WITH_MASKS, cases_of

from vessel.batch import upsample
from vessel.data.transforms import cut_tiles, whole_frame
from vessel.weights.architecture import public_names
from vessel.weights.files import open_safetensors


@pytest.fixture(params=NETWORKS)
def golden(request, golden_network):
    return golden_network(request.param)


def test_loads_with_a_full_report(golden):
    (report,) = golden.model.reports
    assert report.kind == "Sa2VA folder"
    assert {module.fraction for module in report.modules} == {1.0}
    assert not report.names("missing") + report.names("unexpected") + report.names("mismatched")
    assert (
        golden.model.prompt.name
        == {"qwen2": "qwen_chat", "llama": "internlm2_chat"}[golden.model.network.mllm.config.text_config.model_type]
    )


def check_state_and_embedding(golden, case):
    """Compare both with the recorded ones; return image and state."""
    network, prompt, geometry = golden.model.network, golden.model.prompt, golden.model.geometry
    image = golden.image(case)
    tiles = cut_tiles(image, geometry)
    ids, _ = prompt.conversation([golden.cases[case]["text"]], ["[SEG]"], len(tiles) * 256)
    embeddings = network.embed(ids[None], network.encode_tiles(tiles))
    hidden = network.mllm.model.language_model(inputs_embeds=embeddings).last_hidden_state
    state = hidden[ids[None] == prompt.token_ids.seg]
    embedding = network.text_hidden_fcs(state)
    length = int((ids == prompt.token_ids.seg).nonzero()[0])
    assert length == golden.cases[case]["prompt_tokens"]
    for name, found in {"seg_state": state, "seg_embedding": embedding}.items():
        recorded = golden.tensors[f"{case}.{name}"]
        assert (found - recorded).norm() / recorded.norm() < 1e-4, name
    return image, state


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), cases_of(INTERNLM2))
def test_state_and_embedding_are_the_recorded_ones(golden_network, name, case):
    check_state_and_embedding(golden_network(name), case)


@torch.no_grad()
@pytest.mark.parametrize(("name", "case"), cases_of(*WITH_MASKS))
def test_state_embedding_logits_and_mask_are_the_recorded_ones(golden_network, name, case):
    golden = golden_network(name)
    network, geometry = golden.model.network, golden.model.geometry
    image, state = check_state_and_embedding(golden, case)
    logits = network.decode_masks(network.encode_frame(whole_frame(image, geometry)[None]), state, torch.tensor([0]))
    at_1024 = upsample(logits, 1024, (1024, 1024))
    mask = upsample(logits, 1024, image.shape[:2]).sigmoid() > 0.5
    assert (at_1024[:, 8::16, 8::16] - golden.tensors[f"{case}.logits_1024_every_16"]).abs().max() < 1e-3
    assert (mask.numpy() == golden.mask(case)).mean() >= 0.999


def test_every_tensor_goes_out_again_under_its_own_name(golden):
    names = public_names(golden.model.sizes.language)
    stored = dict(open_safetensors(golden.folder).read())
    out = dict(names.to_public(golden.model.network.state_dict().items()))
    assert out.keys() == stored.keys()
    assert all(torch.equal(out[name], stored[name]) for name in stored)
