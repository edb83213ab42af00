"""One rasteriser, lossless files, refusals."""

import numpy as np
import pytest
from PIL import Image
from skimage.draw import line

from vessel.data.masks import mask_polygons, rasterise, read_mask, write_mask
from vessel.errors import VesselError


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def test_rasterised_square_has_its_area():
    mask = rasterise([square(2, 3, 4)], (10, 12))
    expected = np.zeros((10, 12), dtype=bool)
    expected[3:7, 2:6] = True
    assert mask.dtype == bool
    assert np.array_equal(mask, expected)


def test_no_polygon_is_an_empty_mask():
    assert rasterise([], (3, 4)).shape == (3, 4)
    assert not rasterise([], (3, 4)).any()


def test_guard_D6_overlapping_polygons_are_united():
    mask = rasterise([square(0, 0, 6), square(3, 0, 6)], (8, 12))
    assert mask.dtype == bool
    assert mask.sum() == 6 * 9


@pytest.mark.parametrize("polygon", [[1, 1], [1, 1, 5, 5], [0, 0, 4, 0, 4, 4, 0]])
def test_guard_D2_too_few_points_never_reach_the_rasteriser(polygon):
    with pytest.raises(VesselError, match="polygon 1"):
        rasterise([square(0, 0, 3), polygon], (8, 8))


def vessels():
    """Thin lines that cross and enclose holes."""
    mask = np.zeros((60, 70), dtype=bool)
    for a, b, c, d in [(5, 3, 50, 66), (50, 3, 5, 66), (30, 0, 30, 69), (0, 20, 59, 20), (10, 60, 55, 10)]:
        mask[line(a, b, c, d)] = True
    mask[40:50, 40:50] = True
    mask[44:46, 44:46] = False
    return mask


def test_guard_D7_masks_on_disk_keep_holes_and_one_pixel_vessels(tmp_path):
    write_mask(tmp_path / "m.png", vessels())
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "1"
    assert np.array_equal(read_mask(tmp_path / "m.png", (60, 70)), vessels())


@pytest.mark.parametrize("seed", range(4))
def test_guard_D7_polygons_of_a_mask_give_the_same_mask_back(seed):
    mask = vessels() if seed == 0 else np.random.default_rng(seed).random((40, 50)) < 0.2 * seed
    assert np.array_equal(rasterise(mask_polygons(mask), mask.shape), mask)


def test_an_empty_mask_has_no_polygons():
    assert mask_polygons(np.zeros((4, 4), dtype=bool)) == []


def test_true_is_one_in_memory(tmp_path):
    """Compiled code of scikit-image reads beyond its tables where a bool is neither 0 nor 1."""
    write_mask(tmp_path / "m.png", np.eye(6, dtype=bool))
    assert set(np.unique(read_mask(tmp_path / "m.png", (6, 6)).view(np.uint8))) == {0, 1}


@pytest.mark.parametrize("kind", ["1-bit", "0/1", "0/255", "palette", "rgb", "16-bit"])
def test_binary_masks_of_every_kind(tmp_path, kind):
    mask = np.eye(6, dtype=bool)
    palette = Image.fromarray(mask.astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 200, 30, 30])
    image = {
        "1-bit": Image.fromarray(mask),
        "0/1": Image.fromarray(mask.astype(np.uint8)),
        "0/255": Image.fromarray(mask.astype(np.uint8) * 255),
        "palette": palette,
        "rgb": Image.fromarray(np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255),
        "16-bit": Image.fromarray(mask.astype(np.uint16) * 65535),
    }[kind]
    image.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", (6, 6)), mask)


def test_mask_of_another_size_is_refused(tmp_path):
    write_mask(tmp_path / "m.png", np.ones((4, 6), dtype=bool))
    with pytest.raises(VesselError, match=r"m\.png: .*6x4.*4x6.*EXIF"):
        read_mask(tmp_path / "m.png", (6, 4))
    with pytest.raises(VesselError, match=r"m\.png: (?!.*EXIF).*6x4.*8x4"):
        read_mask(tmp_path / "m.png", (4, 8))


@pytest.mark.parametrize("values", [[0, 128, 255], [0, 7], [0, 1, 2]])
def test_grey_masks_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], dtype=np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(VesselError, match=rf"m\.png: .*{', '.join(map(str, values[1:]))}"):
        read_mask(tmp_path / "m.png", (1, len(values)))


def test_unreadable_mask_is_named(tmp_path):
    (tmp_path / "m.png").write_bytes(b"\x89PNG")
    with pytest.raises(VesselError, match=r"m\.png"):
        read_mask(tmp_path / "m.png", (1, 1))
