"""Masks through a pullback by SAM2's memory."""

import pytest
import torch
from tests.golden import WITH_MASKS

from vessel.batch import upsample
from vessel.data.transforms import whole_frame
from vessel.model.grounding import best_candidate
from vessel.model.network import normalise
from vessel.model.tracking import PROMPTED_FRAMES, Tracker


@pytest.fixture
def grounding(plan):
    """Build a tiny SAM2 whose candidates differ in their predicted IoU, so that the choice among them matters."""
    grounding = plan().build().eval().grounding
    torch.nn.init.normal_(grounding.sam_mask_decoder.iou_prediction_head.layers[-1].weight)
    return grounding


def features(grounding, number, *, dtype=torch.float32):
    """Yield features of random frames, one after the other."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        frame = torch.randint(0, 256, (1, 3, 64, 64), generator=generator, dtype=torch.uint8)
        yield grounding.encode(normalise(frame).to(dtype))


def follow(tracker, number, **options):
    with torch.inference_mode():
        return torch.stack([tracker.step(frame) for frame in features(tracker.grounding, number, **options)])


def prompts(grounding, n):
    return torch.randn(n, grounding.hidden_dim, generator=torch.Generator().manual_seed(2))


class FullMemory(Tracker):
    """A tracker that keeps the memory of all frames."""

    def _forget(self):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_MASKS)
def test_golden_pullback_equals_the_recorded_masks(golden_network, name):
    golden = golden_network(name)
    grounding = golden.model.network.grounding
    tracker = Tracker(grounding, golden.tensors["pullback.seg_embedding"])
    for index, ground_truth in enumerate(golden.mask("pullback")):
        image = golden.image(f"pullback_{index}")
        frame = whole_frame(image, golden.model.geometry)
        with torch.inference_mode():
            logits = tracker.step(grounding.encode(normalise(frame[None])))
        at_1024 = upsample(logits, 1024, (1024, 1024))[0, 8::16, 8::16]
        assert torch.allclose(at_1024, golden.tensors["pullback.logits_1024_every_16"][index], rtol=0, atol=1e-5)
        mask = upsample(logits, 1024, image.shape[:2])[0].sigmoid() > 0.5
        assert (mask.numpy() == ground_truth).mean() >= 0.999


def test_memory_does_not_grow_with_the_frames(grounding):
    """Keep five prompted frames, then six memories of masks and fifteen pointers, as SAM2's attention reads them."""
    tracker = Tracker(grounding, prompts(grounding, 2))
    sizes = []
    with torch.inference_mode():
        for frame in features(grounding, 30):
            tracker.step(frame)
            first, recent = tracker.memory["cond_frame_outputs"], tracker.memory["non_cond_frame_outputs"]
            sizes.append((len(first), sum("maskmem_features" in entry for entry in recent.values()), len(recent)))
    assert sizes[4] == (PROMPTED_FRAMES, 0, 0)
    assert sizes[10] == (5, 6, 6)
    assert set(sizes[19:]) == {(5, 6, 15)}


def test_forgetting_changes_no_mask(grounding):
    embeddings = prompts(grounding, 2)
    full = FullMemory(grounding, embeddings)
    assert torch.equal(follow(Tracker(grounding, embeddings), 30), follow(full, 30))
    assert len(full.memory["non_cond_frame_outputs"]) == 25


def test_phrases_are_tracked_together_as_each_alone(grounding):
    embeddings = prompts(grounding, 3)
    together = follow(Tracker(grounding, embeddings), 8)
    apart = torch.cat([follow(Tracker(grounding, one[None]), 8) for one in embeddings], dim=1)
    assert torch.allclose(together, apart, atol=1e-4)


def test_the_first_five_frames_are_prompted_and_are_independent(grounding):
    embeddings = prompts(grounding, 1)
    followed = follow(Tracker(grounding, embeddings), 7)
    with torch.inference_mode():
        alone = torch.cat([best_candidate(*grounding.decode(frame, embeddings)) for frame in features(grounding, 7)])
    assert torch.allclose(followed[:5, 0], alone[:5], atol=1e-5)
    assert not torch.allclose(followed[5:, 0], alone[5:], atol=1e-3)


def test_later_frames_depend_on_earlier_ones(grounding):
    """Change the first frame: the mask of the same sixth one changes."""
    embeddings = prompts(grounding, 1)
    same, other = list(features(grounding, 6)), list(features(grounding, 6))
    with torch.inference_mode():
        other[0] = grounding.encode(torch.ones(1, 3, 64, 64))
        trackers = Tracker(grounding, embeddings), Tracker(grounding, embeddings)
        pairs = zip(trackers, (same, other), strict=True)
        last = [[tracker.step(frame) for frame in frames][-1] for tracker, frames in pairs]
    assert not torch.allclose(*last, atol=1e-4)


@pytest.mark.parametrize("score", [-5.0, 5.0])
def test_without_the_object_the_mask_stays_and_the_pointer_is_the_fixed_one(grounding, score):
    """Keep the mask, which SAM2 overwrites by -1024; Sa2VA was trained without that."""
    head = grounding.sam_mask_decoder.pred_obj_score_head.layers[-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, score)
    embeddings = prompts(grounding, 4)
    tracker = Tracker(grounding, embeddings)
    with torch.inference_mode():
        [frame] = features(grounding, 1)
        four = frame.of(torch.zeros(4, dtype=torch.int64))
        masks, ious, tokens, _ = grounding.candidates(grounding.without_memory(four.top), four.high, embeddings)
        assert torch.equal(tracker.step(frame), masks[range(4), ious.argmax(1)])
        assert ious.argmax(1).all()  # were it the first, the choice would not be tested
        chosen = grounding.obj_ptr_proj(tokens[range(4), ious.argmax(1)])
    expected = chosen if score > 0 else grounding.no_obj_ptr.expand(4, -1)
    assert masks.min() > -100
    assert torch.equal(tracker.memory["cond_frame_outputs"][0]["obj_ptr"], expected)


def test_bf16_weights_give_nearly_the_same_masks(grounding):
    embeddings = prompts(grounding, 2)
    exact = follow(Tracker(grounding, embeddings), 8)
    rounded = follow(Tracker(grounding.bfloat16(), embeddings.bfloat16()), 8, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max() + 0.05
