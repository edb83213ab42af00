"""Image files of every kind become upright RGB, or a message."""

import os

import numpy as np
import pytest
from PIL import Image

from vessel.data.images import PreparedImages, common_depth, pixel_hash, read_rgb
from vessel.errors import VesselError

RNG = np.random.default_rng(0)


def test_rgb_png_comes_back_exactly(tmp_path):
    pixels = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "größe mit leer.png")
    assert np.array_equal(read_rgb(tmp_path / "größe mit leer.png"), pixels)


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255  # left half white; orientation 6 turns it clockwise: white on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    upright = read_rgb(tmp_path / "a.jpg")
    assert upright.shape == (32, 16, 3)
    assert upright[:14].min() > 250
    assert upright[18:].max() < 5


@pytest.mark.parametrize(
    ("maximum", "expected"),
    [(255, 255), (256, 64), (1023, 255), (4095, 255), (2**14 - 1, 255), (40000, 156), (65535, 255)],
)
def test_16_bit_grey_is_scaled_from_its_depth(tmp_path, maximum, expected):
    # 256 needs 10 bits: 256 * 255 / 1023 = 63.8; 40000 needs 16: 40000 * 255 / 65535 = 155.6
    Image.fromarray(np.array([[0, maximum]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").tolist() == [[[0, 0, 0], [expected] * 3]]


def test_16_bit_grey_of_a_series_is_scaled_from_the_depth_given(tmp_path):
    Image.fromarray(np.array([[0, 1000]], dtype=np.uint16)).save(tmp_path / "dark.png")
    assert read_rgb(tmp_path / "dark.png")[0, 1, 0] == 249  # 1000 * 255 / 1023 = 249.3
    assert read_rgb(tmp_path / "dark.png", depth=12)[0, 1, 0] == 62  # 1000 * 255 / 4095 = 62.3


def test_the_depth_of_a_series_is_that_of_its_brightest_16_bit_image(tmp_path):
    Image.new("L", (2, 2), 255).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert common_depth(sorted(tmp_path.iterdir())) is None
    for name, maximum in (("c.png", 200), ("d.png", 3000)):
        Image.fromarray(np.array([[0, maximum]], dtype=np.uint16)).save(tmp_path / name)
    assert common_depth(sorted(tmp_path.iterdir())) == 12


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    image = Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode)
    image.save(tmp_path / "a.tif" if mode in {"CMYK", "YCbCr"} else tmp_path / "a.png")
    rgb = read_rgb(next(tmp_path.iterdir()))
    assert rgb.dtype == np.uint8
    assert rgb.shape == (3, 4, 3)
    assert rgb.min() >= 254


def test_transparency_is_shown_on_black(tmp_path):
    Image.new("RGBA", (2, 2), (200, 100, 50, 0)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").max() == 0


def test_truncated_jpeg_is_named(tmp_path):
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VesselError, match=r"cut\.jpg: .*truncated"):
        read_rgb(tmp_path / "cut.jpg")


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_no_image_is_named(tmp_path, content):
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(VesselError, match=r"b\.png"):
        read_rgb(tmp_path / "b.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(VesselError, match=r"gone\.png"):
        read_rgb(tmp_path / "gone.png")


def test_several_pages_are_refused(tmp_path):
    page = Image.new("L", (4, 4))
    page.save(tmp_path / "run.tif", save_all=True, append_images=[page])
    with pytest.raises(VesselError, match=r"run\.tif: .*\b2 "):
        read_rgb(tmp_path / "run.tif")


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(VesselError, match=r"f\.tif: floating-point"):
        read_rgb(tmp_path / "f.tif")


def test_hash_covers_pixels_and_shape():
    flat = np.arange(12, dtype=np.uint8)
    assert pixel_hash(flat.reshape(2, 2, 3)) == pixel_hash(flat.reshape(2, 2, 3).copy())
    assert pixel_hash(flat.reshape(1, 4, 3)) != pixel_hash(flat.reshape(2, 2, 3))


def test_a_prepared_image_is_hashed_again_only_when_its_file_has_changed(tmp_path, monkeypatch):
    file, hashed = tmp_path / "a.png", []
    monkeypatch.setattr("vessel.data.images.pixel_hash", lambda image: hashed.append(1) or pixel_hash(image))
    first, second = (RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(2))
    Image.fromarray(first).save(file)
    images = PreparedImages()
    for _ in range(3):
        assert np.array_equal(images.read(file, pixel_hash(first)), first)
    assert len(hashed) == 1
    before = file.stat()
    Image.fromarray(second).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    for _ in range(2):
        with pytest.raises(VesselError, match=r"a\.png"):
            images.read(file, pixel_hash(first))
    assert len(hashed) == 3
    with pytest.raises(VesselError, match=r"gone\.png"):
        images.read(tmp_path / "gone.png", pixel_hash(first))
