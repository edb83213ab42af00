from random import Random

import numpy as np
import pytest
import torch

from vessel.batch import InputGeometry
from vessel.data.transforms import Augmentation, QuarterTurns, cut_tiles, tile_count, tile_grid, whole_frame
from vessel.errors import VesselError

# Width, height -> grid and tiles with thumbnail, the golden table of the specification, section 1.3.
TILINGS = {
    (448, 448): ((1, 1), 1), (512, 512): ((1, 1), 1), (565, 584): ((1, 1), 1), (700, 605): ((2, 2), 5),
    (768, 768): ((2, 2), 5), (800, 800): ((2, 2), 5), (999, 960): ((3, 3), 10), (1024, 1024): ((3, 3), 10),
    (2048, 2048): ((3, 3), 10), (640, 480): ((4, 3), 13), (1024, 768): ((4, 3), 13), (1280, 720): ((4, 2), 9),
    (3504, 2336): ((3, 2), 7),
}  # fmt: skip
PUBLIC = InputGeometry(tile_size=448, tokens_per_tile=256, max_tiles=12, frame_size=1024)


@pytest.mark.parametrize(("size", "expected"), TILINGS.items())
def test_golden_table_of_tilings(size, expected):
    grid = tile_grid(*size, tile_size=448, max_tiles=12)
    tiles = grid[0] * grid[1]
    assert (grid, tiles + (tiles > 1)) == expected


def test_golden_table_of_image_tokens():
    tokens = {(512, 512): 256, (700, 605): 1280, (999, 960): 2560, (640, 480): 3328, (1280, 720): 2304}
    for (width, height), expected in tokens.items():
        tiles = cut_tiles(np.zeros((height, width, 3), np.uint8), PUBLIC)
        assert len(tiles) * PUBLIC.tokens_per_tile == expected
        assert tile_count(width, height, PUBLIC) == len(tiles)


def test_each_of_the_35_grids_belongs_to_images_of_its_shape():
    grids = [(i, j) for i in range(1, 13) for j in range(1, 13) if i * j <= 12]
    assert len(grids) == 35
    assert [tile_grid(448 * i, 448 * j, tile_size=448, max_tiles=12) for i, j in grids] == grids


def test_a_larger_grid_of_the_same_shape_wants_more_than_half_its_pixels():
    """2 x 2 tiles of 448 hold 802,816 pixels: 633^2 is less than half of them, 634^2 is more."""
    assert tile_grid(633, 633, tile_size=448, max_tiles=12) == (1, 1)
    assert tile_grid(634, 634, tile_size=448, max_tiles=12) == (2, 2)


def test_tiles_run_row_by_row_with_the_thumbnail_last():
    geometry = InputGeometry(tile_size=8, tokens_per_tile=4, max_tiles=4, frame_size=16)
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8, :8], image[:8, 8:], image[8:, :8], image[8:, 8:] = 10, 20, 30, 40
    tiles = cut_tiles(image, geometry)
    assert tiles.shape == (5, 3, 8, 8)
    assert [int(tile.float().mean()) for tile in tiles] == [10, 20, 30, 40, 25]


def test_whole_frame_ignores_the_aspect_ratio():
    frame = whole_frame(np.full((10, 30, 3), 7, np.uint8), PUBLIC)
    assert frame.shape == (3, 1024, 1024)
    assert frame.dtype == torch.uint8
    assert (frame == 7).all()


def _scene():
    image = np.zeros((64, 64, 3), np.uint8)
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 10:30, 12:40] = True
    masks[1, 40:60, 5:25] = True
    image[masks[0]] = 120
    image[masks[1]] = 220
    return image, masks


def test_the_shipped_augmentation_is_that_of_earlier_versions_to_the_last_bit(random_augmentation):
    import albumentations as A

    transforms = [
        A.HorizontalFlip(p=0.5),
        A.VerticalFlip(p=0.5),
        A.Affine(rotate=(-180.0, 180.0), scale=(1 - 0.1, 1 + 0.1), translate_percent=(-0.05, 0.05), p=0.9),
        A.RandomBrightnessContrast(0.2, 0.2, p=0.5),
        A.RandomGamma((100 - 20.0, 100 + 20.0), p=0.3),
        A.GaussianBlur(sigma_limit=(0.3, 1.0), blur_limit=0, p=0.1),
        A.GaussNoise(std_range=(0.01, 0.05), p=0.1),
    ]
    reference, shipped = A.Compose(transforms), random_augmentation()
    image, masks = _scene()
    for seed in range(60):
        reference.set_random_state(np.random.default_rng(seed), Random(seed))
        expected = reference(image=image, masks=list(masks.astype(np.uint8)))
        moved, moved_masks = shipped(image, masks, seed)
        assert np.array_equal(moved, expected["image"])
        assert np.array_equal(moved_masks, np.stack(expected["masks"]).astype(bool))


def test_what_an_augmentation_may_be_made_of():
    import albumentations as A

    image, masks = _scene()
    nested = Augmentation([A.OneOf([A.Transpose(p=1.0), A.ElasticTransform(p=1.0)], p=1.0)])
    assert np.array_equal(nested(image, masks, 5)[0], nested(image, masks, 5)[0])
    assert any(not np.array_equal(nested(image, masks, seed)[0], nested(image, masks, 5)[0]) for seed in range(9))
    with pytest.raises(VesselError, match=r"data\.augmentation\.transforms"):
        Augmentation([np.flip])
    for wrong in (A.Normalize(), A.ToTensorV2()):
        with pytest.raises(VesselError, match=r"data\.augmentation\.transforms"):
            Augmentation([wrong])(image, masks, 1)


def test_image_and_masks_move_together(random_augmentation):
    image, masks = _scene()
    steady = random_augmentation(0, 1, 2)
    for seed in range(10):
        moved, moved_masks = steady(image, masks, seed)
        assert moved_masks.dtype == bool
        bright = moved[..., 0] > 170
        assert (bright & moved_masks[1]).sum() / max(1, (bright | moved_masks[1]).sum()) > 0.85


def test_the_same_seed_gives_the_same_change(random_augmentation):
    image, masks = _scene()
    augmentation = random_augmentation()
    first, again, other = (augmentation(image, masks, seed) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_changes_are_drawn_independently(random_augmentation):
    """Mirrored left-right, upside down, both and neither are equally frequent."""
    flips = random_augmentation(0, 1)
    image = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    masks = np.zeros((1, 64, 64), bool)
    outcomes = {"neither": image, "left-right": image[:, ::-1], "upside down": image[::-1], "both": image[::-1, ::-1]}
    counts = dict.fromkeys(outcomes, 0)
    for seed in range(200):
        moved = flips(image, masks, seed)[0]
        counts[next(name for name, expected in outcomes.items() if np.array_equal(moved, expected))] += 1
    assert all(30 <= count <= 70 for count in counts.values()), counts


def test_nothing_changes_without_transforms():
    image, masks = _scene()
    same, same_masks = Augmentation([])(image, masks, 1)
    assert np.array_equal(same, image)
    assert np.array_equal(same_masks, masks)


def test_quarter_turns_have_eight_outcomes_equally_often():
    """Those of numpy, by name; image and masks move together and no pixel is lost."""
    image, masks = _scene()
    image[5, 50] = 33  # else a mirror image could look like a turn
    expected = {
        "as it is": image, "90": np.rot90(image), "180": image[::-1, ::-1], "270": np.rot90(image, 3),
        "left-right": image[:, ::-1], "upside down": image[::-1], "transposed": image.swapaxes(0, 1),
        "the other diagonal": image[::-1, ::-1].swapaxes(0, 1),
    }  # fmt: skip
    turns = QuarterTurns()
    counts = dict.fromkeys(expected, 0)
    for seed in range(400):
        moved, moved_masks = turns(image, masks, seed)
        counts[next(name for name, one in expected.items() if np.array_equal(moved, one))] += 1
        assert np.array_equal(moved_masks[0], moved[..., 0] == 120)
        assert np.array_equal(moved_masks[1], moved[..., 0] == 220)
    assert all(30 <= count <= 70 for count in counts.values()), counts
    outcomes = turns.outcomes(image)
    assert len(outcomes) == turns.variants == len(expected)
    assert np.array_equal(outcomes[0], image)
    assert all(any(np.array_equal(one, other) for other in outcomes) for one in expected.values())


def test_quarter_turns_keep_the_shape_of_an_image():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    masks = image[None, ..., 0] > 30
    turns = QuarterTurns()
    expected = [image, image[::-1, ::-1], image[:, ::-1], image[::-1]]
    found = [turns(image, masks, seed) for seed in range(40)]
    assert {one.tobytes() for one, _ in found} == {one.tobytes() for one in expected}
    assert all(np.array_equal(changed, one[None, ..., 0] > 30) for one, changed in found)
    assert [one.tobytes() for one in turns.outcomes(image)] == [one.tobytes() for one in expected]


def test_the_same_seed_gives_the_same_turn():
    image, masks = _scene()
    turns = QuarterTurns()
    assert all(np.array_equal(turns(image, masks, seed)[0], QuarterTurns()(image, masks, seed)[0]) for seed in range(9))


def test_only_quarter_turns_say_how_many_they_are():
    assert (Augmentation([]).variants, QuarterTurns().variants) == (None, 8)
