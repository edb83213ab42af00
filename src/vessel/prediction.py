"""Masks, probabilities and overlays for images without truth, and `results.json`, which says what they are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from vessel.cleanup import Cleanup
from vessel.data.canonical import slug
from vessel.data.images import read_rgb
from vessel.data.inputs import asked_phrases, find_images
from vessel.data.masks import write_mask
from vessel.errors import VesselError
from vessel.figures import overlay
from vessel.inference import Failure, Prediction, Predictor, without_truth
from vessel.restore import Restored, restore

RESULTS_FILE = "results.json"
FOLDERS = ("masks", "probabilities", "overlays")
NO_SEG = "no [SEG] in the answer"
_WHITE = 65535  # a probability of 1 in a 16-bit PNG


@dataclass
class Options:
    """The options of the command; conf/predict.yaml has the defaults, `--help` the explanations."""

    ckpt: str
    images: str
    out: str
    phrases: Any
    split: str | None
    decode: str
    threshold: Any
    cleanup: Cleanup
    overwrite: bool
    batch_size: int
    workers: int
    device: str

    @property
    def target(self) -> Path:
        """Folder of the results."""
        return Path(self.out).expanduser()


def predict(options: Options) -> Mapping[str, Any]:
    """Predict, write and print; results are written as they come.

    Returns:
        the content of results.json.

    Raises:
        VesselError: the checkpoint, an option, the images or the results folder will not do, or every image failed.
    """
    console = Console()
    _free(options)
    targets = find_images(options.images, split=options.split, beside=options.target)
    restored = restore(options.ckpt)
    phrases = asked_phrases(options.phrases, restored.manifest.phrases, restored.prompt)
    folders = _phrase_folders(phrases)
    threshold = _threshold(options.threshold, restored)
    if new := [phrase for phrase in phrases if phrase not in restored.manifest.phrases]:
        known = ", ".join(restored.manifest.phrases)
        console.print(f"warning: never trained on {', '.join(new)}; it was on {known}", style="yellow", soft_wrap=True)
    predictor = Predictor(restored, device=options.device, decode=options.decode)
    _make_place(options)
    writer = _Writer(options.target, folders, threshold, options.cleanup)
    answers = predictor.predict(
        targets,
        without_truth(targets, phrases, restored),
        batch_size=options.batch_size,
        workers=options.workers,
    )
    for answer in track(answers, "predicting", len(targets), transient=True, console=console):
        writer.add(answer)
    results = _results(options, restored, threshold, writer)
    # Last: a folder with results.json is a whole one.
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (options.target / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
    _tell(results, options.target, console)
    if not writer.images:
        raise VesselError(f"none of {len(targets)} images gave a result; the first: {writer.failures[0].reason}")
    return results


def _phrase_folders(phrases: Sequence[str]) -> dict[str, str]:
    folders = {phrase: slug(phrase) for phrase in phrases}
    if len(set(folders.values())) < len(folders):
        raise VesselError(f"phrases={list(phrases)}: two of them would share a folder; ask for one at a time")
    return folders


def _threshold(asked: Any, restored: Restored) -> float:
    if asked == "auto":
        return restored.threshold
    try:
        threshold = float(asked)
    except (TypeError, ValueError):
        threshold = math.nan
    if not 0 < threshold < 1:
        raise VesselError(f"threshold={asked}: use auto, or a number between 0 and 1")
    return threshold


def _free(options: Options) -> None:
    """Refuse a place that holds anything but results which the user wants replaced."""
    out = options.target
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if out.is_file() or set(there) - {*FOLDERS, RESULTS_FILE}:
        raise VesselError(f"out={options.out} holds more than results of vessel.predict; choose another folder")
    if there and not options.overwrite:
        raise VesselError(f"out={options.out} holds results already; choose another folder, or say overwrite=true")


def _make_place(options: Options) -> None:
    (options.target / RESULTS_FILE).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(options.target / name, ignore_errors=True)
        (options.target / name).mkdir(parents=True)


class _Writer:
    """Writes the files of one image after the other.

    Attributes:
        images: an entry of results.json for each.
        failures: what has no entry.
    """

    def __init__(self, out: Path, folders: Mapping[str, str], threshold: float, cleanup: Cleanup) -> None:
        self.out, self.folders, self.threshold, self.cleanup = out, folders, threshold, cleanup
        self.images: list[dict[str, Any]] = []
        self.failures: list[Failure] = []

    def add(self, answer: Prediction | Failure) -> None:
        """Write the result of an image."""
        if isinstance(answer, Failure):
            self.failures.append(answer)
            return
        target, sample = answer.target, answer.sample
        masks = np.zeros((len(sample.phrases), *sample.size), dtype=bool)
        entries: dict[str, dict[str, Any]] = {}
        for index, phrase in enumerate(sample.phrases):
            probability = answer.probabilities[index]
            if probability is None:
                entries[phrase] = {"mask": None, "probability": None, "area": None, "reason": NO_SEG}
                continue
            masks[index] = self.cleanup(probability.numpy() > self.threshold)
            entries[phrase] = self._write_phrase(target.id, phrase, masks[index], probability.numpy())
        drawn = self._place("overlays", target.id)
        Image.fromarray(overlay(read_rgb(target.file), masks)).save(drawn)
        self.images.append(
            {
                "file": target.name,
                "id": target.id,
                "size": list(sample.size),
                "text": "\n".join(answer.answers),
                "overlay": self._name(drawn),
                "phrases": {phrase: {**entry, "threshold": self.threshold} for phrase, entry in entries.items()},
            }
        )

    def _write_phrase(
        self, name: str, phrase: str, mask: NDArray[np.bool_], probability: NDArray[np.float32]
    ) -> dict[str, Any]:
        mask_file = self._place(f"masks/{self.folders[phrase]}", name)
        probability_file = self._place(f"probabilities/{self.folders[phrase]}", name)
        write_mask(mask_file, mask)
        # Noise in the low bits hardly compresses; trying harder would cost more time than the network takes.
        Image.fromarray((probability * _WHITE).round().astype(np.uint16)).save(probability_file, compress_level=1)
        return {"mask": self._name(mask_file), "probability": self._name(probability_file), "area": int(mask.sum())}

    def _place(self, folder: str, name: str) -> Path:
        file = self.out / folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _name(self, file: Path) -> str:
        return file.relative_to(self.out).as_posix()


def _results(options: Options, restored: Restored, threshold: float, writer: _Writer) -> dict[str, Any]:
    entries = [entry for image in writer.images for entry in image["phrases"].values()]
    return {
        "run": restored.manifest.name,
        "fingerprint": restored.manifest.fingerprint,
        "decode": options.decode,
        "threshold": threshold,
        "cleanup": asdict(options.cleanup),
        "probability_files": f"16-bit grey PNG; probability = value / {_WHITE}",
        "area_unit": "pixels",
        "n_ok": len(writer.images),
        "n_failed": len(writer.failures),
        "n_without_mask": sum(entry["mask"] is None for entry in entries),
        "failures": [asdict(failure) for failure in writer.failures],
        "images": writer.images,
    }


def _tell(results: Mapping[str, Any], out: Path, console: Console) -> None:
    console.print(
        f"{results['n_ok']} images predicted at threshold {results['threshold']:.2f} with weights "
        f"{results['fingerprint']}, {results['n_failed']} failed: {out}",
        soft_wrap=True,
    )
    for failure in results["failures"][:10]:
        console.print(f"failed: {failure['file']}: {failure['reason']}", style="red", soft_wrap=True, markup=False)
    if results["n_without_mask"]:
        console.print(f"{results['n_without_mask']} times: {NO_SEG}", style="yellow", soft_wrap=True, markup=False)
