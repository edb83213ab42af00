from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from vessel.batch import TokenIds, upsample
from vessel.data.prompt import Prompt
from vessel.data.transforms import cut_tiles, whole_frame
from vessel.errors import VesselError
from vessel.model.grounding import GroundingSizes
from vessel.model.groups import choose_trainable
from vessel.model.lora import Lora, add_lora
from vessel.model.mllm import LanguageSizes, VisionSizes
from vessel.model.sa2va import Sizes, build_sa2va
from vessel.model.weights import load_state, read_safetensors, to_native

# Ids of the public tokenizer, as the specification lists them.
PUBLIC = TokenIds(seg=151674, image=151667, pad=151643, eos=151645)
# Fully assembled networks of the specification; the 256 elements of SAM2's position matrix are a buffer.
TOTALS = {"1b": 1_163_665_714, "2b": 2_316_157_490, "8b": 8_182_606_386, "14b": 15_369_268_786}


def _count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.fixture
def network(plan):
    return plan().build().eval()


@pytest.mark.parametrize("size", TOTALS)
def test_true_sizes_have_the_parameter_totals_of_the_specification(compose, size):
    sizes = compose("train", [f"model=internvl3_{size}"]).model
    with torch.device("meta"):
        network = build_sa2va(sizes, PUBLIC)
    assert _count(network.parameters()) + 256 == TOTALS[size]
    assert _count(network.grounding.state_dict().values()) == 224_430_386
    assert len(network.grounding.state_dict()) == 900


@pytest.mark.parametrize(
    ("rank", "adapters", "trainable"), [(64, 161_480_704, 1_276_256_256), (128, 322_961_408, None)]
)
def test_trainable_counts_of_lora_on_8b(compose, rank, adapters, trainable):
    config = compose("train", [f"experiment=lora_r{rank}"])
    with torch.device("meta"):
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
    with pytest.raises(VesselError, match="0 image tokens but the vision encoder made 4"):
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
    with pytest.raises(VesselError, match="one resolution"):
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
    """Guard T11: no unused heads under plain DDP, for each choice of what trains."""
    for trainable, rank in (("all", 0), ("lora", 4), ("decoder_only", 0)):
        network = plan(trainable=trainable, lora=Lora(r=rank)).build()
        output = network(make_batch([["lumen", "cap"]]))
        (output.mask_logits.mean() + output.lm_logits.logsumexp(-1).mean()).backward()
        silent = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert not silent


GOLDEN = [("square", "Please segment the blood vessel."), ("wide", "Please segment the lumen in this image.")]


@pytest.mark.parametrize(("case", "question"), GOLDEN)
def test_golden_network_computes_what_the_public_code_computes(shared, case, question):
    folder = shared("golden/sa2va_qwen2")
    expected = load_file(folder / "expected.safetensors")
    prompt = Prompt(str(folder))
    language = LanguageSizes(width=64, layers=2, heads=4, kv_heads=2, mlp=128, vocabulary=362, context=8192)
    grounding = GroundingSizes(
        embed_dim=16,
        heads=1,
        stages=(1, 2, 2, 1),
        global_blocks=(4,),
        width=64,
        memory_width=16,
        memory_layers=2,
        memory_mlp=128,
    )
    sizes = Sizes(language, VisionSizes(width=32, layers=2, heads=4, mlp=64), grounding)
    network = build_sa2va(sizes, prompt.token_ids).eval()
    load_state(network, to_native(read_safetensors(folder)), "golden").require_complete()
    image = np.array(Image.open(folder / "images" / f"{case}.png").convert("RGB"))
    tiles = cut_tiles(image, sizes.views)
    ids, _ = prompt.conversation([question], ["[SEG]"], len(tiles) * 256)
    with torch.no_grad():
        hidden = network.mllm.model.language_model(inputs_embeds=network.embed(ids[None], tiles)).last_hidden_state
        state = hidden[ids[None] == prompt.token_ids.seg]
        logits = network.masks(whole_frame(image, sizes.views)[None], state, torch.tensor([0]))
        masks = upsample(logits, 1024, image.shape[:2]).sigmoid() > 0.5
        at_1024 = upsample(logits, 1024, (1024, 1024))
    assert torch.allclose(state, expected[f"{case}.seg_state"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(network.text_hidden_fcs(state), expected[f"{case}.seg_embedding"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(at_1024[:, 8::16, 8::16], expected[f"{case}.logits_1024_every_16"], atol=1e-3)
    truth = np.unpackbits(expected[f"{case}.mask"].numpy(), axis=-1)[..., : image.shape[1]].astype(bool)
    assert (masks.numpy() == truth).mean() >= 0.999


def test_sizes_from_configuration_are_plain(compose):
    assert not OmegaConf.is_config(compose("train", ["model=tiny"]).model.language)
