"""Masks drawn by hand and what is left of them."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.morphology import isotropic_closing, isotropic_opening

from vessel.errors import VesselError
from vessel.inference.cleanup import Cleanup


@pytest.fixture
def ring():
    """A square ring of 24 pixels around a hole of 25, a single pixel in a corner."""
    mask = np.zeros((12, 12), dtype=bool)
    mask[2:9, 2:9] = True
    mask[3:8, 3:8] = False
    mask[11, 11] = True
    return mask


def test_nothing_is_done_unless_asked_for(ring):
    assert np.array_equal(Cleanup()(ring), ring)


def test_holes_are_filled(ring):
    assert Cleanup(fill_holes=True)(ring).sum() == 7 * 7 + 1


def test_small_components_go_and_others_stay_whole(ring):
    assert np.array_equal(Cleanup(min_size=2)(ring), ring & (np.arange(12) < 11))
    assert Cleanup(min_size=24)(ring).sum() == 24
    assert not Cleanup(min_size=25)(ring).any()


def test_pixels_that_touch_at_a_corner_are_one_component():
    diagonal = np.eye(5, dtype=bool)
    assert np.array_equal(Cleanup(min_size=5)(diagonal), diagonal)


def test_opening_removes_what_is_thin():
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:12, 2:12] = True
    mask[15, :] = True
    opened = Cleanup(opening=2)(mask)
    assert not opened[15].any()
    assert opened[4:10, 4:10].all()


def test_closing_bridges_a_gap():
    mask = np.zeros((20, 20), dtype=bool)
    mask[8:12, 2:9] = mask[8:12, 11:18] = True
    closed = Cleanup(closing=2)(mask)
    assert closed[9:11, 9:11].all()
    assert not closed[0].any()


@pytest.mark.parametrize("radius", [0.5, 1, 1.5, 2, 3, 5.5])
def test_opening_and_closing_are_those_of_scikit_image(radius):
    smooth = gaussian_filter(np.random.default_rng(0).random((61, 90)), 4)
    for mask in (smooth > np.median(smooth), smooth > np.quantile(smooth, 0.8)):
        assert np.array_equal(Cleanup(opening=radius)(mask), isotropic_opening(mask, radius))
        assert np.array_equal(Cleanup(closing=radius)(mask), isotropic_closing(mask, radius))


@pytest.mark.parametrize("cleanup", [Cleanup(opening=3), Cleanup(closing=3)], ids=str)
def test_empty_and_full_masks_stay(cleanup):
    """scikit-image's distances are undefined there: its opening leaves a corner of what is wholly removed."""
    assert not cleanup(np.zeros((20, 30), dtype=bool)).any()
    assert cleanup(np.ones((20, 30), dtype=bool)).all()


def test_an_opening_that_nothing_outlasts_leaves_nothing(ring):
    assert not Cleanup(opening=5)(ring).any()


def test_the_mask_given_is_not_changed(ring):
    before = ring.copy()
    Cleanup(opening=1, closing=1, fill_holes=True, min_size=5)(ring)
    assert np.array_equal(ring, before)


@pytest.mark.parametrize("name", ["opening", "closing", "min_size"])
def test_negative_sizes_are_refused(name):
    with pytest.raises(VesselError, match=rf"cleanup\.{name}=-1"):
        Cleanup(**{name: -1})
