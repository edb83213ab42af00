"""The files that vessel.predict leaves for each image: masks, probabilities, overlays and films."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from vessel.data.canonical import slug
from vessel.data.images import read_rgb
from vessel.data.masks import write_mask
from vessel.decision import Decision
from vessel.figures import overlay
from vessel.film import Film
from vessel.inference import Failure, Prediction
from vessel.pullback import Pullback

FOLDERS = ("masks", "probabilities", "overlays")
NO_SEG = "no [SEG] in the answer"
WHITE = 65535  # a probability of 1 in a 16-bit PNG
_FILES = ("mask", "probability")


class ResultFiles:
    """Writes the files of one image after the other.

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

    def add_pullback(self, pullback: Pullback, answers: Iterator[Prediction | Failure], console: Console) -> None:
        """Write the results of its frames and a film of them; when a frame fails, nothing of it stays."""
        before, failed = len(self.images), len(self.failures)
        file = self._place("overlays", f"{pullback.id}/film", suffix=".mp4")
        with Film(file) as film:
            for answer in track(answers, "predicting", len(pullback.frames), transient=True, console=console):
                drawn = self.add(answer, depth=pullback.depth)
                if drawn is not None:
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

    def add(self, answer: Prediction | Failure, *, depth: int | None = None) -> NDArray[np.uint8] | None:
        """Write the result of an image, whose 16-bit grey has `depth` bits; returns its overlay, None of a failure."""
        if isinstance(answer, Failure):
            self.failures.append(answer)
            return None
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
        drawn = overlay(read_rgb(target.file, depth=depth), masks)
        overlay_file = self._place("overlays", target.id)
        Image.fromarray(drawn).save(overlay_file)
        self.images.append(
            {
                "file": target.name,
                "id": target.id,
                "size": list(sample.size),
                "text": "\n".join(answer.answers),
                "overlay": self._name(overlay_file),
                "phrases": {phrase: {**entry, "threshold": threshold} for phrase, entry in entries.items()},
            }
        )
        return drawn

    def _write_phrase(
        self, name: str, phrase: str, mask: NDArray[np.bool_], probability: NDArray[np.float32]
    ) -> dict[str, Any]:
        mask_file = self._place(f"masks/{slug(phrase)}", name)
        probability_file = self._place(f"probabilities/{slug(phrase)}", name)
        write_mask(mask_file, mask)
        # Noise in the low bits hardly compresses; trying harder would cost more time than the network takes.
        Image.fromarray((probability * WHITE).round().astype(np.uint16)).save(probability_file, compress_level=1)
        return {"mask": self._name(mask_file), "probability": self._name(probability_file), "area": int(mask.sum())}

    def _place(self, folder: str, name: str, *, suffix: str = ".png") -> Path:
        file = self.out / folder / (name + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _name(self, file: Path) -> str:
        return file.relative_to(self.out).as_posix()
