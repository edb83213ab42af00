import pytest
import torch
from torch.nn import functional as F

from vessel.losses import NativeLoss, Sa2vaLoss, dice_loss, lm_loss, mask_bce, sample_at, uncertain_points

ZERO, HALF = torch.zeros(1, 4), torch.tensor([[1.0, 1, 0, 0]])


def test_golden_dice_and_cross_entropy_of_the_specification():
    assert 0.5 * dice_loss(ZERO, HALF) == pytest.approx(0.19998, abs=1e-5)
    assert 2 * mask_bce(ZERO, HALF) == pytest.approx(1.38626, abs=1e-5)


def test_dice_of_two_masks_is_their_mean():
    logits = torch.tensor([[9.0, 9, -9, -9], [0, 0, 0, 0]])
    targets = HALF.expand(2, 4)
    each = [dice_loss(logits[i : i + 1], targets[i : i + 1]) for i in range(2)]
    assert dice_loss(logits, targets) == pytest.approx(float(sum(each)) / 2, abs=1e-4)


def test_empty_truth_is_driven_to_an_empty_prediction():
    empty = torch.zeros(1, 4)
    assert dice_loss(torch.full((1, 4), 20.0), empty) > 0.7
    assert dice_loss(torch.full((1, 4), -20.0), empty) < 1e-3


def test_lm_loss_is_cross_entropy():
    logits, targets = torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 4])
    assert torch.equal(lm_loss(logits.bfloat16(), targets), F.cross_entropy(logits.bfloat16().float(), targets))


def test_native_loss_agrees_with_a_loop_over_masks():
    logits = torch.randn(3, 8, 8)
    masks = (torch.rand(1, 20, 24) > 0.5, torch.rand(2, 17, 15) > 0.5)
    found = NativeLoss(mask_weight=3.0, dice_weight=1.5)(logits, masks, 32)
    bce, dice = 0.0, 0.0
    for one, mask in zip(logits, [masks[0][0], masks[1][0], masks[1][1]], strict=True):
        big = F.interpolate(one[None, None], (32, 32), mode="bilinear")
        full = F.interpolate(big, mask.shape, mode="bilinear")[0, 0]
        bce += F.binary_cross_entropy_with_logits(full, mask.float()) / 3
        p = full.sigmoid()
        dice += (1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)) / 3
    assert found["mask_loss"] == pytest.approx(float(3 * bce), rel=1e-3)
    assert found["dice_loss"] == pytest.approx(float(1.5 * dice), rel=1e-3)


def test_guard_D6_overlapping_polygons_cannot_make_the_loss_negative():
    """Masks are boolean by type, so a target is 0 or 1 and cross-entropy is bounded below by 0."""
    masks = (torch.ones(1, 16, 16, dtype=torch.bool),)
    for loss_function in (NativeLoss(), Sa2vaLoss(points=64)):
        losses = loss_function(torch.full((1, 4, 4), 30.0), masks, 16)
        assert all(value >= 0 for value in losses.values())


def test_guard_D8_a_one_pixel_vessel_counts_in_the_loss():
    thin = torch.zeros(1, 512, 512, dtype=torch.bool)
    thin[:, 101] = True  # nearest resizing to 256 x 256 would drop every odd row
    none = torch.zeros_like(thin)
    assert F.interpolate(thin[None].float(), (256, 256), mode="nearest").sum() == 0
    logits = torch.zeros(1, 256, 256, requires_grad=True)
    for loss_function in (NativeLoss(), Sa2vaLoss(points=200_000)):
        torch.manual_seed(0)
        with_vessel = sum(loss_function(logits, (thin,), 1024).values())
        torch.manual_seed(0)
        without = sum(loss_function(logits, (none,), 1024).values())
        gradient = torch.autograd.grad(with_vessel - without, logits)[0][0]
        assert gradient[50].abs().sum() > 100 * gradient[200].abs().sum()


def test_guard_T9_every_object_counts():
    logits = torch.zeros(8, 4, 4, requires_grad=True)
    masks = (torch.ones(8, 16, 16, dtype=torch.bool),)
    for loss_function in (NativeLoss(), Sa2vaLoss(points=64)):
        gradient = torch.autograd.grad(sum(loss_function(logits, masks, 16).values()), logits)[0]
        assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_uncertain_points_lie_where_the_logit_is_small():
    logits = torch.full((1, 64, 64), 8.0)
    logits[:, :, 32:] = 0.0
    torch.manual_seed(0)
    points = uncertain_points(logits, 400, oversample=3.0, importance=0.75)
    assert points.shape == (1, 400, 2)
    assert (points[0, :, 0] > 0.5).float().mean() > 0.8


def test_sample_at_reads_pixel_centres():
    maps = torch.arange(16.0).view(1, 4, 4)
    centres = torch.tensor([[[0.125, 0.125], [0.875, 0.375]]])  # (x, y) of pixels (0, 0) and row 1, column 3
    assert torch.allclose(sample_at(maps, centres), torch.tensor([[0.0, 7.0]]))
