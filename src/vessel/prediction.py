"""Masks, probabilities and overlays for images without truth, and `results.json`, which says what they are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from vessel.batch import Sample
from vessel.cleanup import Cleanup
from vessel.data.canonical import slug
from vessel.data.images import read_rgb
from vessel.data.inputs import Target, asked_phrases, find_images
from vessel.data.masks import write_mask
from vessel.data.questions import check_question
from vessel.errors import VesselError
from vessel.figures import overlay
from vessel.film import Film
from vessel.inference import Failure, Prediction, Predictor, asking, choose_device, without_truth
from vessel.places import expanded
from vessel.pullback import Pullback, find_pullbacks, follow
from vessel.restore import NetworkOptions, Restored, restore

RESULTS_FILE = "results.json"
FOLDERS = ("masks", "probabilities", "overlays")
NO_SEG = "no [SEG] in the answer"
_FILES = ("mask", "probability")
_WHITE = 65535  # a probability of 1 in a 16-bit PNG


@dataclass
class Options:
    """The options of the command; conf/predict.yaml has the defaults, `--help` the explanations."""

    ckpt: str
    images: str
    out: str
    phrases: Any
    question: str | None
    mask_prompts: str | None
    video: bool
    split: str | None
    decode: str
    max_new_tokens: int
    threshold: Any
    cleanup: Cleanup
    overwrite: bool
    batch_size: int
    workers: int
    device: str
    network: NetworkOptions

    @property
    def target(self) -> Path:
        """Folder of the results."""
        return expanded(self.out)


def predict(options: Options) -> Mapping[str, Any]:
    """Predict, write and print; results are written as they come.

    Returns:
        the content of results.json.

    Raises:
        VesselError: the checkpoint, an option, the images or the results folder will not do, or every image failed.
    """
    console = Console()
    _free(options)
    _check_question(options)
    targets = find_images(options.images, split=options.split, beside=options.target)
    device = choose_device(options.device)
    restored = restore(options.ckpt, options.network.reading(device))
    for told in restored.reports:
        console.print(told.table())
    phrases = _phrases(options, restored, console)
    threshold = _threshold(options.threshold, restored)
    predictor = Predictor(
        restored,
        device=device,
        device_map=options.network.device_map,
        decode=options.decode,
        max_new_tokens=options.max_new_tokens,
    )
    _make_place(options)
    writer = _Writer(options.target, threshold, options.cleanup)
    if options.video:
        for pullback in find_pullbacks(options.images, targets):
            writer.add_pullback(pullback, follow(predictor, pullback, phrases, question=options.question), console)
    else:
        load = _loader(options, targets, phrases, restored)
        answers = predictor.predict(targets, load, batch_size=options.batch_size, workers=options.workers)
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


def _check_question(options: Options) -> None:
    if options.video and options.mask_prompts is not None:
        raise VesselError("mask_prompts= with video=true: regions belong to one image; leave one of the two away")
    if options.question is None:
        if options.mask_prompts is not None:
            raise VesselError("mask_prompts= without question=: ask what you want to know about region1, region2, …")
        return
    if options.phrases is not None:
        raise VesselError("question= and phrases= exclude each other: a question names what it is about itself")
    if options.decode != "generate":
        raise VesselError(f"question= with decode={options.decode}: only the network knows the answer, decode=generate")
    if options.mask_prompts is not None and not expanded(options.mask_prompts).is_dir():
        raise VesselError(f"mask_prompts={options.mask_prompts}: name a folder of masks; `--help` says their names")


def _phrases(options: Options, restored: Restored, console: Console) -> tuple[str, ...]:
    """What to look for; nothing with a free question."""
    if options.question is not None:
        check_question(options.question, restored.prompt)
        return ()
    known = restored.manifest.phrases
    phrases = asked_phrases(options.phrases, known, restored.prompt)
    if not phrases:
        raise VesselError(f"phrases= is missing: ckpt={options.ckpt} does not say what it was trained to segment")
    if len({slug(phrase) for phrase in phrases}) < len(phrases):
        raise VesselError(f"phrases={list(phrases)}: two of them would share a folder; ask for one at a time")
    if known and (new := [phrase for phrase in phrases if phrase not in known]):
        told = f"warning: never trained on {', '.join(new)}; it was on {', '.join(known)}"
        console.print(told, style="yellow", soft_wrap=True)
    return phrases


def _loader(
    options: Options, targets: Sequence[Target], phrases: Sequence[str], restored: Restored
) -> Callable[[int], Sample]:
    if options.question is None:
        return without_truth(targets, phrases, restored)
    regions = None if options.mask_prompts is None else expanded(options.mask_prompts)
    return asking(targets, options.question, restored, regions=regions)


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
        pullbacks: an entry for each, with `video=true`.
        failures: what has no entry.
    """

    def __init__(self, out: Path, threshold: float, cleanup: Cleanup) -> None:
        self.out, self.threshold, self.cleanup = out, threshold, cleanup
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
        target, sample = answer.target, answer.sample
        masks = np.zeros((len(sample.phrases), *sample.size), dtype=bool)
        entries: dict[str, dict[str, Any]] = {}
        for index, phrase in enumerate(sample.phrases):
            probability = answer.probabilities[index]
            if probability is None:
                entries[phrase] = {**dict.fromkeys(_FILES), "area": None, "reason": NO_SEG}
                continue
            masks[index] = self.cleanup(probability.numpy() > self.threshold)
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
                "phrases": {phrase: {**entry, "threshold": self.threshold} for phrase, entry in entries.items()},
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
        Image.fromarray((probability * _WHITE).round().astype(np.uint16)).save(probability_file, compress_level=1)
        return {"mask": self._name(mask_file), "probability": self._name(probability_file), "area": int(mask.sum())}

    def _place(self, folder: str, name: str, *, suffix: str = ".png") -> Path:
        file = self.out / folder / (name + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _name(self, file: Path) -> str:
        return file.relative_to(self.out).as_posix()


def _results(options: Options, restored: Restored, threshold: float, writer: _Writer) -> dict[str, Any]:
    entries = [entry for image in writer.images for entry in image["phrases"].values()]
    silent = sum(entry["mask"] is None for entry in entries) + sum(not image["phrases"] for image in writer.images)
    return {
        "run": restored.manifest.name,
        "fingerprint": restored.manifest.fingerprint,
        "decode": options.decode,
        "question": options.question,
        "threshold": threshold,
        "cleanup": asdict(options.cleanup),
        "probability_files": f"16-bit grey PNG; probability = value / {_WHITE}",
        "area_unit": "pixels",
        "n_ok": len(writer.images),
        "n_failed": len(writer.failures),
        "n_without_mask": silent,
        "failures": [asdict(failure) for failure in writer.failures],
        "pullbacks": writer.pullbacks,
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
    for image in results["images"][:10] if results["question"] else ():
        console.print(f"{image['file']}: {image['text']}", soft_wrap=True, markup=False)
    if results["n_without_mask"]:
        console.print(f"{results['n_without_mask']} times: {NO_SEG}", style="yellow", soft_wrap=True, markup=False)
