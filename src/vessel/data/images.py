"""Read images of any file format for every command: uint8 RGB, upright."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vessel.errors import Problem, VesselError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
BIT_DEPTHS = (8, 10, 12, 14, 16)


def depth_of(maximum: int) -> int:
    """Return the smallest of `BIT_DEPTHS` that holds a grey value below 2**16."""
    return next(bits for bits in BIT_DEPTHS if maximum < 2**bits)


def common_depth(files: Iterable[Path]) -> int | None:
    """Return the depth that holds every 16-bit grey image; None when there is none. Only these are decoded.

    Files that `read_rgb` refuses are passed over.
    """
    greatest = []
    for file in files:
        try:
            with Image.open(file) as opened:
                if opened.mode.startswith("I"):
                    greatest.append(int(np.asarray(opened).max()))
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            continue
    fitting = [value for value in greatest if value < 2 ** BIT_DEPTHS[-1]]
    return depth_of(max(fitting)) if fitting else None


def read_rgb(path: Path, *, depth: int | None = None) -> np.ndarray:
    """Read any common image file as upright RGB.

    EXIF rotation is applied. Grey becomes three equal channels. 16-bit grey is scaled linearly from `depth` bits.
    Transparency is shown on black.

    Args:
        path: the file.
        depth: bits of 16-bit grey, which files do not state. None takes the smallest of 8, 10, 12, 14 and 16 that
            holds the maximum of this image: a dark image of a 12-bit series comes out brighter than in its series.

    Returns:
        uint8 [H, W, 3].

    Raises:
        VesselError: when the file is missing, unreadable, truncated, or of a kind without one clear RGB picture.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            pages = getattr(opened, "n_frames", 1)
            if pages > 1 and opened.format != "MPO":  # a phone's MPO holds one picture and its thumbnails
                raise VesselError(Problem(str(path), f"holds {pages} pictures", "save each as a file of its own"))
            upright = ImageOps.exif_transpose(opened)
    except VesselError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        # Pillow's message repeats the path; its class and first line are what helps.
        reason = (
            f"cannot be read as an image ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
        raise VesselError(Problem(str(path), reason, "replace the file by an intact copy, or remove it")) from error
    return _to_rgb(upright, path, depth)


def _to_rgb(image: Image.Image, path: Path, depth: int | None) -> np.ndarray:
    if image.mode.startswith("I"):
        return np.repeat(_to_8_bit(np.asarray(image), path, depth)[..., None], 3, axis=2)
    if image.mode == "F":
        raise VesselError(Problem(str(path), "floating-point pixels have no known range", "save it as 8- or 16-bit"))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.array(image.convert("RGB"))


def _to_8_bit(grey: np.ndarray, path: Path, depth: int | None) -> np.ndarray:
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high >= 2 ** BIT_DEPTHS[-1]:
        reason = f"grey values {low} to {high} do not fit 16 bits"
        raise VesselError(Problem(str(path), reason, "save it as 8- or 16-bit grey"))
    bits = depth or depth_of(high)
    return np.rint(grey.astype(np.float64) * (255 / (2**bits - 1))).astype(np.uint8)


class PreparedImages:
    """A reader of prepared images that checks their digest: once, and again when a file has changed."""

    def __init__(self) -> None:
        self._verified: dict[tuple[str, str], tuple[int, int] | None] = {}

    def read(self, path: Path, sha256: str) -> np.ndarray:
        """Read an image of a prepared data set, uint8 [H, W, 3].

        Args:
            path: the file.
            sha256: `pixel_hash` of what was prepared.

        Raises:
            VesselError: as `read_rgb`, or it is another image.
        """
        try:
            found = path.stat()  # before it is read: a change in between is found next time
            state = (found.st_size, found.st_mtime_ns)
        except OSError:
            state = None  # `read_rgb` raises the error
        image = read_rgb(path)
        if state is None or self._verified.get((str(path), sha256)) != state:
            if pixel_hash(image) != sha256:
                raise VesselError(
                    f"{path} is not the image that was prepared; copy the data set again, or prepare it again"
                )
            self._verified[str(path), sha256] = state
        return image


def pixel_hash(image: np.ndarray) -> str:
    """Compute the SHA-256 of decoded pixels and their shape: equal for copies of an image in different file formats."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
