"""InputGeometry and their way back, on images that are not square."""

import numpy as np
import pytest
import torch

from vessel.errors import VesselError
from vessel.inference.tta import (
    AUGMENTATIONS,
    FLIPS,
    SCALES,
    TURNS,
    augment_image,
    average_augmented,
    check_augmentations,
)


def seen(image, view):
    """Imitate a network that marks bright red pixels of a variant: probabilities [1, h, w]."""
    return torch.from_numpy(augment_image(image, view)[..., 0] / 255.0).float()[None]


@pytest.fixture(params=[(40, 52), (41, 37), (7, 64), (3, 3)], ids=str)
def image(request):
    return np.random.default_rng(0).integers(0, 256, (*request.param, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("flip_lr", [[3, 2, 1], [6, 5, 4]]),
        ("flip_ud", [[4, 5, 6], [1, 2, 3]]),
        ("turn_90", [[3, 6], [2, 5], [1, 4]]),
        ("turn_180", [[6, 5, 4], [3, 2, 1]]),
        ("turn_270", [[4, 1], [5, 2], [6, 3]]),
    ],
)
def test_flips_and_turns_by_hand(view, expected):
    small = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    assert augment_image(np.stack([small] * 3, axis=-1), view)[..., 2].tolist() == expected


def test_scales_by_hand():
    """A tenth of the sides is left away, or an eighth added and mirrored, on each side."""
    image = np.arange(40 * 24 * 3).reshape(40, 24, 3).astype(np.uint8)
    assert np.array_equal(augment_image(image, "scale_1.25"), image[4:36, 2:22])
    padded = augment_image(image, "scale_0.8")
    assert padded.shape == (50, 30, 3)
    assert np.array_equal(padded[5:45, 3:27], image)
    assert np.array_equal(padded[4], padded[5])
    assert np.array_equal(padded[0, 3:27], image[4])


@pytest.mark.parametrize("view", AUGMENTATIONS)
def test_an_equivariant_network_gives_the_identical_map(image, view):
    own = torch.from_numpy(image[..., 0] / 255.0).float()[None]
    assert torch.equal(average_augmented(own, [(view, seen(image, view))]), own)


def test_all_views_of_an_equivariant_network_give_the_identical_map(image):
    own = torch.from_numpy(image[..., 0] / 255.0).float()[None]
    assert torch.equal(average_augmented(own, [(view, seen(image, view)) for view in AUGMENTATIONS]), own)


def test_the_mean_is_taken_over_the_views_that_show_a_pixel():
    own = torch.zeros(1, 20, 10)
    flipped, inner = torch.ones(1, 20, 10), torch.ones(1, 16, 8)
    mean = average_augmented(own, [("flip_lr", flipped), ("scale_1.25", inner)])
    expected = torch.full((1, 20, 10), 1 / 2)
    expected[:, 2:18, 1:9] = 2 / 3
    assert torch.allclose(mean, expected)


def test_names():
    assert check_augmentations([*FLIPS, *TURNS, *SCALES]) == AUGMENTATIONS
    with pytest.raises(VesselError, match=r"turn_45 is none; choose among flip_lr, .*scale_1.25"):
        check_augmentations(["flip_lr", "turn_45"])
    with pytest.raises(VesselError, match="twice"):
        check_augmentations(["flip_lr", "flip_lr"])
