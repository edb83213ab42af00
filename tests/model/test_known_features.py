"""Features of the frozen encoders in place of tiles and frames, and compiled layers, give the same results."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from vessel.batch import FeaturePyramid, Features, Sample, collate
from vessel.losses import NativeLoss, lm_loss
from vessel.model.lora import Lora


@pytest.fixture
def samples(prompt, plan):
    """Make two samples with ground truth, of one and of three tiles."""
    geometry, generator = plan().sizes.geometry, torch.Generator().manual_seed(1)

    def pixels(*shape):
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def make(name, count, phrases):
        ids, labels = prompt.encode(phrases, count * geometry.tokens_per_tile)
        tiles, frame = (
            pixels(count, 3, geometry.tile_size, geometry.tile_size),
            pixels(3, geometry.frame_size, geometry.frame_size),
        )
        masks = pixels(len(phrases), 24, 20) > 127
        return Sample(name, "p", "v", tuple(phrases), tiles, frame, ids, labels, (24, 20), masks)

    return [make("a", 1, ["lumen"]), make("b", 3, ["lumen", "cap"])]


def without_pixels(network, sample):
    """Replace tiles and frame of a sample by features."""
    with torch.no_grad():
        features = Features(network.encode_tiles(sample.tiles), network.encode_frame(sample.frame[None]))
    return replace(sample, tiles=sample.tiles[:0], frame=sample.frame[:, :0, :0], features=features)


def learn(network, batch):
    """Return losses, gradients and output of a batch."""
    network.zero_grad()
    output = network(batch)
    losses = dict(NativeLoss()(output.mask_logits, batch.masks, network.frame_size))
    losses["lm_loss"] = lm_loss(output.lm_logits, output.lm_targets)
    sum(losses.values()).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return losses, gradients, output


@pytest.mark.parametrize("known", [(True, True), (True, False), (False, True)], ids=["all", "first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_replace_tiles_and_frames(plan, samples, prompt, known, dtype):
    network = plan(lora=Lora(r=4), trainable="lora").build().to(dtype).eval()
    given = [without_pixels(network, s) if is_known else s for s, is_known in zip(samples, known, strict=True)]
    expected = learn(network, collate(samples, prompt.token_ids.pad))
    batch = collate(given, prompt.token_ids.pad)
    assert len(batch.frames) == 2 - sum(known)
    found = learn(network, batch)
    assert found[1].keys() == expected[1].keys()
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **close)


def test_encoders_do_not_run_on_what_is_known(plan, samples, prompt):
    network = plan(trainable="decoder_only").build().eval()
    calls = []
    for part in ("vision encoder", "SAM2 image encoder"):
        network.parts()[part].register_forward_hook(lambda *_, part=part: calls.append(part))
    batch = collate([without_pixels(network, sample) for sample in samples], prompt.token_ids.pad)
    calls.clear()
    with torch.no_grad():
        network(batch)
    assert calls == []


def test_features_that_are_not_those_of_the_prompt_are_noticed(plan, samples, prompt):
    network = plan().build().eval()
    wrong = without_pixels(network, samples[1])
    wrong = replace(wrong, features=wrong.features._replace(tile_features=wrong.features.tile_features[:1]))
    with pytest.raises(ValueError, match=r" 12 .* 4 features"):
        network(collate([wrong], prompt.token_ids.pad))


def test_a_batch_moves_whole(plan, samples, prompt):
    network = plan().build().eval()
    batch = collate([samples[0], without_pixels(network, samples[1])], prompt.token_ids.pad).to("meta")
    nothing, known = batch.features
    assert nothing is None
    assert isinstance(known.pyramid, FeaturePyramid)
    assert all(tensor.is_meta for tensor in (known.tile_features, *known.pyramid))


@pytest.mark.slow
def test_compiled_layers_give_the_same(plan, samples, prompt):
    network = plan(lora=Lora(r=4), trainable="lora").build().eval()
    batch = collate(samples, prompt.token_ids.pad)
    names, expected = list(network.state_dict()), learn(network, batch)
    network.compile_layers("aot_eager")  # all of torch's compiler but the code generator
    found = learn(network, batch)
    assert list(network.state_dict()) == names
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)
