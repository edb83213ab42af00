"""The reference computes what the network computes: the two differ in work alone."""

from dataclasses import replace

import pytest
import torch
from bench.fixed_answer import fix_answer, standard_answer

from bench import reference
from vessel.batch import FeaturePyramid, Features, Sample
from vessel.losses import NativeLoss, lm_loss
from vessel.model.lora import Lora

PHRASES = ("lumen", "side branch", "lipid core", "cap", "vessel", "stent", "thrombus", "calcium")
LOSS = NativeLoss(lm_weight=0.7, mask_weight=2.0, dice_weight=0.5)
TRAINED = {"lora": Lora(r=4, dropout=0.0), "all": Lora(r=0)}


@pytest.fixture
def network(plan):
    """Return a function that builds a network whose adapters and choice among the candidate masks are not trivial."""

    def make(trainable="lora", dtype=torch.float32):
        made = plan(trainable=trainable, lora=TRAINED[trainable]).build().train()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name or "iou_prediction_head.layers.2" in name:
                    parameter.normal_(std=0.1)
        return made.to(dtype)

    return make


@pytest.fixture
def batch(make_batch):
    """Return a function that makes two images, the second with one phrase; masks of its objects differ."""

    def make(phrases):
        made = make_batch([list(PHRASES[:phrases]), ["lumen"]])
        generator = torch.Generator().manual_seed(1)
        return replace(made, masks=tuple(torch.rand(m.shape, generator=generator) > 0.7 for m in made.masks))

    return make


def product(network, batch):
    output = network(batch)
    losses = dict(LOSS(output.mask_logits, batch.masks, network.frame_size))
    return losses | {"lm_loss": LOSS.lm_weight * lm_loss(output.lm_logits, output.lm_targets)}


def gradients(network, losses):
    network.zero_grad()
    sum(losses.values()).backward()
    trained = ((name, p) for name, p in network.named_parameters() if p.requires_grad)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained}


def with_features(network, batch):
    """Put the first image's features in place of its pixels, as a cache that misses the second would."""
    with torch.no_grad():
        known = Features(network.encode_tiles(batch.tiles[:1]), FeaturePyramid(*network.encode_frame(batch.frames[:1])))
    return replace(batch, tiles=batch.tiles[1:], frames=batch.frames[1:], features=(known, None))


def difference(one, other):
    """Compute the largest difference, relative to the largest value."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-12))


CHOICES = [
    *(("lora", k, cached) for k in (1, 2, 3, 5, 6, 8) for cached in (False, True)),
    *(("all", k, False) for k in (3, 8)),  # an encoder that trains has no features to keep
]


@pytest.mark.parametrize(("trainable", "phrases", "cached"), CHOICES)
def test_losses_and_gradients_are_those_of_the_network(network, batch, trainable, phrases, cached):
    made, given = network(trainable), batch(phrases)
    own = product(made, with_features(made, given) if cached else given)
    plain = reference.losses(made, given, LOSS)
    assert own.keys() == plain.keys()
    for name in own:
        assert own[name].item() == pytest.approx(plain[name].item(), rel=1e-5), name
    ours, theirs = gradients(made, own), gradients(made, plain)
    assert len(ours) == len(theirs) > 60
    largest = max(float(grad.abs().max()) for grad in ours.values())
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-4 * ours[name].abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize("phrases", [1, 2, 3, 5, 6, 8])
def test_masks_of_all_slots_are_those_of_their_object(network, batch, phrases):
    made, given = network(), batch(phrases)
    with torch.no_grad():
        own, plain = made(given), reference.forward(made, given)
    assert len(plain.slots) == {1: 5, 2: 5, 3: 5, 5: 5, 6: 10, 8: 10}[phrases] + 5
    assert plain.slots.unique().tolist() == list(range(phrases + 1))
    assert difference(plain.mask_logits, own.mask_logits[plain.slots]) < 1e-5
    supervised = given.labels[:, 1:] != -100
    assert difference(plain.lm_logits[:, :-1][supervised], own.lm_logits) < 1e-5


@pytest.mark.parametrize("phrases", [1, 3, 6])
def test_in_bf16_both_are_as_far_from_float32(network, batch, phrases):
    """bf16 keeps 8 bits, 0.4 %: some layers later the two may differ by a few percent of the largest value."""
    made, given = network(dtype=torch.bfloat16), batch(phrases)
    own, plain = product(made, given), reference.losses(made, given, LOSS)
    for name in own:
        assert own[name].item() == pytest.approx(plain[name].item(), rel=0.02), name
    with torch.no_grad():
        masks = reference.forward(made, given)
        assert difference(masks.mask_logits, made(given).mask_logits[masks.slots]) < 0.05
    ours, theirs = gradients(made, own), gradients(made, plain)
    flat = [torch.cat([grads[name].float().flatten() for name in ours]) for grads in (ours, theirs)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


def sample_of(batch):
    return Sample(
        id="f", patient="p", video="v", phrases=batch.phrases[0], tiles=batch.tiles[:1], frame=batch.frames[0],
        input_ids=batch.input_ids[0], labels=batch.labels[0], size=batch.sizes[0],
    )  # fmt: skip


@pytest.mark.parametrize("phrases", [1, 2, 5, 8])
def test_prediction_phrase_by_phrase_is_that_of_one_pass(network, batch, prompt, phrases):
    made, given = network().eval(), batch(phrases)
    with torch.no_grad():
        own = made.probabilities(made(given), given)[0]
    plain = reference.predict_forced(made, prompt, sample_of(given))
    assert torch.allclose(torch.stack(plain), own, atol=1e-5)


@pytest.mark.parametrize("phrases", [1, 3])
def test_masks_of_generated_answers_are_those_of_given_ones(network, batch, prompt, phrases):
    made, given = network().eval(), batch(phrases)
    with torch.no_grad():
        own = made.probabilities(made(given), given)[0]
    answer = standard_answer(prompt)
    with fix_answer(made, answer):
        plain = reference.predict_generated(made, prompt, sample_of(given), max_new_tokens=len(answer))
    assert [len(maps) for maps in plain] == [1] * phrases
    assert torch.allclose(torch.stack([maps[0] for maps in plain]), own, atol=1e-5)
