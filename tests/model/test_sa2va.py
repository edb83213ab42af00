from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from omegaconf import OmegaConf

from vessel.batch import TokenIds
from vessel.errors import VesselError
from vessel.model.groups import choose_trainable
from vessel.model.lora import Lora, add_lora
from vessel.model.sa2va import Sa2VA, build_sa2va
from vessel.weights.architecture import public_names

# Ids of the public tokenizers: of Qwen2.5 as the specification lists them, of InternLM2.5 as its folders do.
PUBLIC = TokenIds(seg=151674, image=151667, pad=151643, eos=151645)
PUBLIC_INTERNLM2 = TokenIds(seg=92553, image=92546, pad=2, eos=92542)
SAM2 = 224_430_386
# Elements and public keys of fully assembled networks; the elements are those of the specification.
TOTALS = {
    "internvl2_5_1b": (1_163_665_714, 1541),
    "internvl3_1b": (1_163_665_714, 1541),
    "internvl3_2b": (2_316_157_490, 1589),
    "internvl2_5_4b": (3_941_809_714, 1685),
    "internvl3_8b": (8_182_606_386, 1589),
    "internvl3_14b": (15_369_268_786, 1829),
}


def internlm2_totals(layers: int, width: int, mlp: int, *, vision: int, vision_width: int) -> int:
    """Count the elements of a network on InternLM2 with eight key heads of 128, from the table of the specification."""
    rows, keys = 92_553 + 5, 8 * 128
    layer = width * (width + 2 * keys) + width * width + 3 * width * mlp + 2 * width
    language = 2 * rows * width + layers * layer + width
    shuffled = 4 * vision_width
    projector = 2 * shuffled + shuffled * width + width + width * width + width
    text_hidden_fcs = width * width + width + width * 256 + 256
    return language + vision + projector + text_hidden_fcs + SAM2


def internvit_6b(layers: int = 45, width: int = 3200, mlp: int = 12_800) -> int:
    """Count elements: no biases on query, key and value, six vectors for norms and scales a layer, a class token."""
    layer = 4 * width * width + width + 2 * width * mlp + mlp + width + 6 * width
    return layers * layer + (1 + 1025) * width + 3 * 14 * 14 * width + width


def _count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.fixture
def network(plan):
    return plan().build().eval()


@pytest.fixture
def outline(compose):
    """Return a function: `outline("internvl3_8b")` builds a network of true size without content, with public names."""

    def build(model: str) -> tuple[Sa2VA, dict[str, torch.Tensor]]:
        sizes = compose("train", [f"model={model}"]).model
        with init_empty_weights(include_buffers=False):
            network = build_sa2va(sizes, PUBLIC if sizes.language.family == "qwen2" else PUBLIC_INTERNLM2)
        return network, dict(public_names(sizes.language).to_public(network.state_dict().items()))

    return build


@pytest.mark.parametrize("model", TOTALS)
def test_true_sizes_have_the_totals_of_the_specification(outline, model):
    network, public = outline(model)
    assert (_count(public.values()), len(public)) == TOTALS[model]
    assert _count(network.grounding.state_dict().values()) == SAM2
    assert len(network.grounding.state_dict()) == 900


# Public keys: of a layer of the language model 7, of InternViT-300M 14 and of InternViT-6B 13; 3, 4 and 4 around them;
# 6 of the projector, 900 of SAM2, 4 of text_hidden_fcs.
def test_true_sizes_on_internlm2_are_those_of_its_formula(outline):
    _, public = outline("internvl2_5_8b")
    assert _count(public.values()) == internlm2_totals(32, 4096, 14_336, vision=304_012_288, vision_width=1024)
    assert len(public) == 7 * 32 + 3 + 14 * 24 + 4 + 6 + 900 + 4
    assert public["language_model.model.layers.31.attention.wqkv.weight"].shape == (6144, 4096)


def test_true_sizes_on_internlm2_with_internvit_6b_are_those_of_their_formulas(outline):
    _, public = outline("internvl2_5_26b")
    assert _count(public.values()) == internlm2_totals(48, 6144, 16_384, vision=internvit_6b(), vision_width=3200)
    assert len(public) == 7 * 48 + 3 + 13 * 45 + 4 + 6 + 900 + 4
    assert public["vision_model.encoder.layers.44.attn.k_norm.weight"].shape == (3200,)


@pytest.mark.parametrize(
    ("rank", "adapters", "trainable"), [(64, 161_480_704, 1_276_256_256), (128, 322_961_408, None)]
)
def test_trainable_counts_of_lora_on_8b(compose, rank, adapters, trainable):
    config = compose("train", [f"experiment=lora_r{rank}"])
    with init_empty_weights(include_buffers=False):
        network = build_sa2va(config.model, PUBLIC)
        add_lora(network, config.lora, new_tokens=range(151674, 151679), seg_is_trained=True)
    choose_trainable(network, config.trainable)
    groups = {name: _count(p for _, p in group) for name, group in network.trainable_groups().items()}
    assert groups["lora"] == adapters
    assert groups["tokens"] == 2 * 151_679 * 3584
    assert groups["projector"] == 27_540_480
    assert groups["mask_decoder"] == 4_215_109 - 264_453  # without the two heads that get no gradient
    if trainable:
        assert _count(p for p in network.mllm.parameters() if p.requires_grad) == trainable
        assert _count(network.mllm.parameters()) == 9_193_125_376


def test_guard_T2_image_tokens_must_equal_vision_features(network, make_batch, prompt):
    batch = make_batch([["lumen"]])
    blind = batch.input_ids.clone()
    blind[blind == prompt.token_ids.image] = prompt.token_ids.pad
    with pytest.raises(VesselError, match=r" 0 .* 4 features"):
        network(replace(batch, input_ids=blind))


def test_guard_T2_output_changes_with_the_image(network, make_batch):
    batch = make_batch([["lumen"]])
    with torch.no_grad():
        base = network(batch)
        other_tiles = network(replace(batch, tiles=255 - batch.tiles))
        other_frame = network(replace(batch, frames=255 - batch.frames))
    assert not torch.allclose(base.lm_logits, other_tiles.lm_logits, atol=1e-5)
    assert not torch.allclose(base.mask_logits, other_tiles.mask_logits, atol=1e-6)  # through the [SEG] state
    assert not torch.allclose(base.mask_logits, other_frame.mask_logits, atol=1e-5)


def test_guard_T8_one_resolution_for_training_and_prediction(network, make_batch):
    batch = make_batch([["lumen"]])
    with pytest.raises(VesselError, match=r"\(32, 32\) .*64 x 64"):
        network(replace(batch, frames=batch.frames[..., :32, :32]))


def test_guard_T9_eight_phrases_are_eight_masks(network, make_batch):
    phrases = [f"vessel {i}" for i in range(8)]
    with torch.no_grad():
        output = network(make_batch([phrases, ["lumen"]]))
    assert output.mask_logits.shape == (9, 16, 16)
    assert output.seg_to_image.tolist() == [0] * 8 + [1]


def test_phrases_without_seg_tokens_are_refused(network, make_batch):
    batch = make_batch([["lumen"]])
    with pytest.raises(VesselError, match=r"\[SEG\]"):
        network(replace(batch, phrases=(("lumen", "cap"),)))


def test_batching_changes_nothing(network, make_batch):
    batch = make_batch([["lumen"], ["fibrous cap", "lumen"]])
    alone = [
        replace(
            batch, ids=batch.ids[i : i + 1], phrases=batch.phrases[i : i + 1], tiles=batch.tiles[i : i + 1],
            frames=batch.frames[i : i + 1], input_ids=batch.input_ids[i : i + 1],
            attention_mask=batch.attention_mask[i : i + 1], labels=batch.labels[i : i + 1],
        )
        for i in range(2)
    ]  # fmt: skip
    with torch.no_grad():
        together = network(batch).mask_logits
        apart = torch.cat([network(one).mask_logits for one in alone])
    assert torch.allclose(together, apart, atol=1e-4)


def test_bf16_weights_give_nearly_the_same_masks(network, make_batch):
    batch = make_batch([["lumen"]])
    with torch.no_grad():
        exact = network(batch).mask_logits
        rounded = network.bfloat16()(batch).mask_logits
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max() + 0.05


def test_every_trainable_parameter_gets_a_gradient(plan, make_batch):
    """Check guard T11: no unused heads under plain DDP, for each choice of `trainable=`."""
    for trainable, rank in (("all", 0), ("lora", 4), ("decoder_only", 0)):
        network = plan(trainable=trainable, lora=Lora(r=rank)).build()
        output = network(make_batch([["lumen", "cap"]]))
        (output.mask_logits.mean() + output.lm_logits.logsumexp(-1).mean()).backward()
        silent = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert not silent


def test_sizes_from_configuration_are_plain(compose):
    assert not OmegaConf.is_config(compose("train", ["model=tiny"]).model.language)
