"""The files that vessel.predict leaves for each image: masks, probabilities, overlays and films."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vessel.data.catalog import slug
from vessel.data.images import read_rgb
from vessel.data.masks import write_mask
from vessel.inference.decision import Decision
from vessel.inference.predictor import Failure
from vessel.inference.pullbacks import Pullback
from vessel.inference.results import Prediction
from vessel.plotting.overlays import overlay
from vessel.plotting.video import VideoWriter

NO_SEG = "no [SEG] in the answer"
WHITE = 65535  # a probability of 1 in a 16-bit PNG
WRITERS = 4  # threads that write while the network computes; as many results wait at most
_FILES = ("mask", "probability")


class ResultFiles:
    """Writes the files of images, several at a time, and lists them in the order of the images.

    Args:
        out: folder of the results.
        decision: from probabilities to masks.

    Attributes:
        images: an entry of results.json for each.
        pullbacks: an entry for each, with `video=true`.
        failures: what has no entry.
    """

    def __init__(self, out: Path, decision: Decision) -> None:
        self.out, self.decision = out, decision
        self.images: list[dict[str, Any]] = []
        self.pullbacks: list[dict[str, Any]] = []
        self.failures: list[Failure] = []

    def add(self, answers: Iterable[Prediction | Failure]) -> None:
        """Write the results of images as they come."""
        deque(self._written(answers), maxlen=0)

    def add_pullback(self, pullback: Pullback, answers: Iterable[Prediction | Failure]) -> None:
        """Write the results of its frames and a film of them; when a frame fails, nothing of it stays."""
        before, failed = len(self.images), len(self.failures)
        file = self._place("overlays", f"{pullback.id}/film", suffix=".mp4")
        with VideoWriter(file) as film:
            for drawn in self._written(answers, depth=pullback.depth):
                film.add(drawn)
        if len(self.failures) == failed:
            self.pullbacks.append({"id": pullback.id, "frames": len(pullback.frames), "film": self._name(file)})
            return
        file.unlink(missing_ok=True)
        for image in self.images[before:]:
            kept = [image["overlay"], *(entry[kind] for entry in image["phrases"].values() for kind in _FILES)]
            for name in filter(None, kept):
                (self.out / name).unlink()
        del self.images[before:]

    def _written(
        self, answers: Iterable[Prediction | Failure], *, depth: int | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        """Overlays in order, of images whose 16-bit grey has `depth` bits; never more than `WRITERS` in waiting."""
        waiting: deque[Future[tuple[dict[str, Any], NDArray[np.uint8]]]] = deque()

        def oldest() -> NDArray[np.uint8]:
            entry, drawn = waiting.popleft().result()
            self.images.append(entry)
            return drawn

        with ThreadPoolExecutor(WRITERS) as pool:
            for answer in answers:
                if isinstance(answer, Failure):
                    self.failures.append(answer)
                    continue
                if len(waiting) == WRITERS:
                    yield oldest()
                waiting.append(pool.submit(self._write, answer, depth))
            while waiting:
                yield oldest()

    def _write(self, answer: Prediction, depth: int | None) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """The files of an image: its entry, and its overlay."""
        target, sample, threshold = answer.target, answer.sample, self.decision.threshold
        masks = np.zeros((len(sample.phrases), *sample.size), dtype=bool)
        entries: dict[str, dict[str, Any]] = {}
        for index, phrase in enumerate(sample.phrases):
            probability = answer.probabilities[index]
            if probability is None:
                entries[phrase] = {**dict.fromkeys(_FILES), "area": None, "reason": NO_SEG}
                continue
            masks[index] = self.decision(probability.numpy())
            entries[phrase] = self._write_phrase(target.id, phrase, masks[index], probability.numpy())
        # Read again, and not kept since it was shown to the network: large images would wait in memory by the batch.
        drawn = overlay(read_rgb(target.file, depth=depth), masks)
        overlay_file = self._place("overlays", target.id)
        _write_png(overlay_file, drawn[..., ::-1])
        entry = {
            "file": target.name,
            "id": target.id,
            "size": list(sample.size),
            "text": "\n".join(answer.answers),
            "overlay": self._name(overlay_file),
            "phrases": {phrase: {**entry, "threshold": threshold} for phrase, entry in entries.items()},
        }
        return entry, drawn

    def _write_phrase(
        self, name: str, phrase: str, mask: NDArray[np.bool_], probability: NDArray[np.float32]
    ) -> dict[str, Any]:
        mask_file = self._place(f"masks/{slug(phrase)}", name)
        probability_file = self._place(f"probabilities/{slug(phrase)}", name)
        write_mask(mask_file, mask)
        _write_png(probability_file, (probability * WHITE).round().astype(np.uint16))
        return {"mask": self._name(mask_file), "probability": self._name(probability_file), "area": int(mask.sum())}

    def _place(self, folder: str, name: str, *, suffix: str = ".png") -> Path:
        file = self.out / folder / (name + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _name(self, file: Path) -> str:
        return file.relative_to(self.out).as_posix()


def _write_png(file: Path, pixels: np.ndarray) -> None:
    """Write 16-bit grey [H, W] or 8-bit BGR [H, W, 3], compressed lightly: noise in low bits hardly gets smaller."""
    file.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
