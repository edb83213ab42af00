"""Write an H.264 video frame by frame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video import VideoStream

FRAMES_PER_SECOND = 15
_QUALITY = {"crf": "18"}  # the scale of x264; visually lossless


class VideoWriter:
    """A writer of an H.264 video; a context manager, at whose end the file is whole. Without a frame there is no file.

    Args:
        file: `*.mp4`.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open: tuple[OutputContainer, VideoStream] | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Write the next frame, uint8 [H, W, 3], RGB, all of one size."""
        import av

        height, width = picture.shape[:2]
        # Colours are stored at half the resolution: an odd side repeats its last line.
        even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._open is None:
            container = av.open(str(self.file), "w")
            stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=_QUALITY)
            stream.height, stream.width = even.shape[:2]
            stream.pix_fmt = "yuv420p"  # the one that every player shows
            self._open = container, stream
        container, stream = self._open
        container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            container, stream = self._open
            container.mux(stream.encode(None))
            container.close()
