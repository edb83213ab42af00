"""Centre lines, outlines and components against slow second implementations, MONAI's own scores and hand values."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import gaussian_filter, label
from scipy.spatial import cKDTree
from skimage.draw import line
from skimage.morphology import isotropic_dilation, skeletonize

from vessel.metrics.shape import centreline_scores, component_error, surface_scores

SPACINGS = [(1.0, 1.0), (0.5, 2.0), (0.013, 0.02)]


def blobs(seed, size=(48, 64)):
    """A bool [H, W] of a few round things, some cut by the border of the image."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(size), 4)
    return field > np.quantile(field, 0.8)


def vessels(seed, size=(48, 64), width=1.5):
    """A bool [H, W] of crossing bright lines, border to border."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, dtype=bool)
    for _ in range(3):
        ends = rng.integers(0, size[0], 2)
        mask[line(int(ends[0]), 0, int(ends[1]), size[1] - 1)] = True
    return isotropic_dilation(mask, width)


def shifted(mask, seed):
    """The mask, misplaced, with pieces lost and pieces invented."""
    rng = np.random.default_rng(seed)
    moved = np.roll(mask, rng.integers(-3, 4, 2), (0, 1))
    return (moved & ~blobs(seed + 50, mask.shape)) | (blobs(seed + 90, mask.shape) & blobs(seed + 70, mask.shape))


PAIRS = [(shifted(paint(seed), seed), paint(seed)) for paint in (blobs, vessels) for seed in range(5)]
PAIRS += [(blobs(8), vessels(9)), (vessels(1), vessels(2)), (np.ones((48, 64), dtype=bool), vessels(3, width=0.5))]


def outline(mask):
    """Coordinates [N, 2] of the pixels that have one of four neighbours outside the mask or the image."""
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            inside = [0 <= r < height and 0 <= c < width and mask[r, c] for r, c in around]
            if mask[y, x] and not all(inside):
                found.append((y, x))
    return np.array(found)


def distances(predicted, true, spacing):
    """From each outline to the nearest point of the other, float64."""
    one, two = outline(predicted) * np.array(spacing), outline(true) * np.array(spacing)
    return cKDTree(two).query(one)[0], cKDTree(one).query(two)[0]


def percentile(values, share):
    """Linear interpolation between the two neighbours in rank."""
    ranked = sorted(values)
    at = share * (len(ranked) - 1)
    low = int(at)
    return ranked[low] + (at - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_surface_scores_equal_nearest_neighbours_of_outlines_found_by_loops(pair, spacing):
    predicted, true = PAIRS[pair]
    tolerance = 2.3 * spacing[0]
    hd95, nsd = surface_scores(predicted, true, spacing=spacing, tolerance=tolerance)
    there, back = distances(predicted, true, spacing)
    assert hd95 == pytest.approx(max(percentile(there, 0.95), percentile(back, 0.95)), rel=1e-5)
    near = sum(d <= tolerance for d in there) + sum(d <= tolerance for d in back)
    assert nsd == pytest.approx(near / (len(there) + len(back)), abs=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_surface_scores_equal_the_scores_of_monai(pair, spacing):
    predicted, true = PAIRS[pair]
    tensors = [torch.from_numpy(mask)[None, None] for mask in (predicted, true)]
    theirs = {"include_background": True, "spacing": list(spacing)}
    hd95, nsd = surface_scores(predicted, true, spacing=spacing, tolerance=2 * spacing[1])
    assert hd95 == pytest.approx(compute_hausdorff_distance(*tensors, percentile=95, **theirs).item(), rel=1e-6)
    assert nsd == pytest.approx(compute_surface_dice(*tensors, [2 * spacing[1]], **theirs).item(), rel=1e-6)


def test_surface_scores_by_hand():
    true, predicted = np.zeros((2, 20, 30), dtype=bool)
    true[10, 5:25] = True
    predicted[13, 5:25] = True  # three rows lower: every point is 3 rows from the other line
    assert surface_scores(predicted, true, spacing=(1.0, 1.0), tolerance=3.0) == (3.0, 1.0)
    assert surface_scores(predicted, true, spacing=(1.0, 1.0), tolerance=2.9) == (3.0, 0.0)
    # 3 * 0.1 is not 0.3 in floating point; a distance equal to the tolerance still counts.
    hd95, nsd = surface_scores(predicted, true, spacing=(0.1, 7.0), tolerance=0.3)
    assert hd95 == pytest.approx(0.3)
    assert nsd == 1.0
    predicted[13, 25:30] = True  # 20 points at 3, then sqrt(9 + k * k) for k = 1 to 5; rank 22.8 of 0 to 24
    hd95, nsd = surface_scores(predicted, true, spacing=(1.0, 1.0), tolerance=3.0)
    assert hd95 == pytest.approx(5 - 0.2 * (5 - 18**0.5))
    assert nsd == pytest.approx(40 / 45)


def test_hd95_looks_both_ways():
    true, predicted = np.zeros((2, 9, 60), dtype=bool)
    true[4], predicted[4, :10] = True, True  # all that was predicted is right, most was missed
    assert surface_scores(predicted, true, spacing=(1.0, 1.0), tolerance=1.0)[0] > 40
    assert surface_scores(true, predicted, spacing=(1.0, 1.0), tolerance=1.0)[0] > 40


@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_centreline_scores_equal_loops_over_uncropped_skeletons(pair):
    predicted, true = PAIRS[pair]

    def share(line_of, mask):
        points = [(y, x) for y in range(48) for x in range(64) if line_of[y, x]]
        return sum(bool(mask[point]) for point in points) / len(points)

    precision, sensitivity = share(skeletonize(predicted), true), share(skeletonize(true), predicted)
    harmonic = 0.0 if precision == sensitivity == 0 else 2 / (1 / precision + 1 / sensitivity)
    assert centreline_scores(predicted, true) == pytest.approx((harmonic, sensitivity))


def test_centreline_scores_by_hand():
    true, predicted = np.zeros((2, 30, 40), dtype=bool)
    true[11, 5:25] = True  # lines of one pixel are their own centre lines
    predicted[11, 5:25] = True
    predicted[20, 5:15] = True  # 10 of 30 pixels are invented
    assert centreline_scores(predicted, true) == pytest.approx((0.8, 1.0))
    assert centreline_scores(true, predicted) == pytest.approx((0.8, 2 / 3))
    predicted[11] = False
    assert centreline_scores(predicted, true) == (0.0, 0.0)


def test_a_thin_branch_counts_by_its_length():
    true = np.zeros((40, 60), dtype=bool)
    true[5:25] = True
    true[25:40, 30] = True
    without = true.copy()
    without[25:] = False
    dice = 2 * (without & true).sum() / (without.sum() + true.sum())
    assert dice > 0.99
    assert centreline_scores(without, true)[1] < 0.85


@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_component_error_equals_scipy(pair):
    predicted, true = PAIRS[pair]
    counts = [label(mask, structure=np.ones((3, 3)))[1] for mask in (predicted, true)]
    assert component_error(predicted, true) == abs(counts[0] - counts[1])


def test_component_error_by_hand():
    true, predicted = np.zeros((2, 8, 8), dtype=bool)
    true[1, 1] = true[2, 2] = True  # touch at a corner: one
    predicted[1, 1] = predicted[1, 3] = predicted[5, 5] = True
    assert component_error(predicted, true) == 2
    assert component_error(true, predicted) == 2
    assert component_error(np.zeros_like(true), true) == 1


@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_background_around_the_masks_changes_nothing(pair):
    predicted, true = PAIRS[pair]
    wide = [np.pad(mask, ((7, 12), (30, 1))) for mask in (predicted, true)]
    for spacing in SPACINGS:
        near = {"spacing": spacing, "tolerance": 3 * spacing[0]}
        assert surface_scores(*wide, **near) == pytest.approx(surface_scores(predicted, true, **near), rel=1e-6)
    assert centreline_scores(*wide) == centreline_scores(predicted, true)
    assert component_error(*wide) == component_error(predicted, true)


def test_a_mask_that_is_not_empty_has_a_centre_line():
    """Else a share of nothing would count as perfect. All masks of 3 x 4 pixels."""
    bits = np.arange(1, 1 << 12)[:, None] >> np.arange(12) & 1
    assert all(skeletonize(mask).any() for mask in bits.reshape(-1, 3, 4).astype(bool))
