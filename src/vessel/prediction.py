"""Masks, probabilities and overlays for images without truth, and `results.json`, which says what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from vessel.batch import Sample
from vessel.data.canonical import slug
from vessel.data.inputs import Target, asked_phrases, find_images
from vessel.data.questions import check_question
from vessel.decision import AUTO, CleanupOptions, Decision, decided_by_user, given_decision
from vessel.errors import VesselError
from vessel.inference import Predictor, choose_device
from vessel.model.baselines import require_known
from vessel.places import expanded
from vessel.pullback import find_pullbacks, follow
from vessel.queries import asking, without_truth
from vessel.restore import NetworkOptions, Restored, restore
from vessel.result_files import FOLDERS, NO_SEG, WHITE, ResultFiles

RESULTS_FILE = "results.json"


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
    decision: str | None
    threshold: Any
    low: Any
    cleanup: CleanupOptions
    views: Any
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
    _require_language(options, restored)
    for told in restored.reports:
        console.print(told.table())
    phrases = _phrases(options, restored, console)
    decision, source = _decision(options, restored, console)
    predictor = Predictor(
        restored,
        device=device,
        device_map=options.network.device_map,
        decode=options.decode,
        max_new_tokens=options.max_new_tokens,
        views=decision.views,
    )
    _make_place(options)
    writer = ResultFiles(options.target, decision)
    if options.video:
        for pullback in find_pullbacks(options.images, targets):
            writer.add_pullback(pullback, follow(predictor, pullback, phrases, question=options.question), console)
    else:
        load = _loader(options, targets, phrases, restored)
        answers = predictor.predict(targets, load, batch_size=options.batch_size, workers=options.workers)
        for answer in track(answers, "predicting", len(targets), transient=True, console=console):
            writer.add(answer)
    results = _results(options, restored, writer, source)
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


def _require_language(options: Options, restored: Restored) -> None:
    asked = {
        "question=": options.question,
        "video=true": options.video,
        "decode=generate": options.decode == "generate",
    }
    if needs := [option for option, given in asked.items() if given]:
        restored.require_language(needs[0])


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
    require_known(restored.network, phrases)
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


def _decision(options: Options, restored: Restored, console: Console) -> tuple[Decision, str]:
    """What validation chose, but for what the user says; and where it comes from, in words."""
    alone = "video=true" if options.video else f"decode={options.decode}" if options.decode != "forced" else None
    if alone and options.views not in (AUTO, None, []):
        raise VesselError(f"views= with {alone}: several views make no one answer; use decode=forced without video")
    chosen, source = restored.decision, restored.decision_source
    if options.decision is not None:
        chosen, source = given_decision(options.decision, restored.manifest)
    asked = {"threshold": options.threshold, "low": options.low, "cleanup": options.cleanup, "views": options.views}
    decision = decided_by_user(chosen, **asked)
    if decision != chosen:
        source = f"the user's; validation: {chosen}, {source}"
    if alone and decision.views:
        source += f"; {alone} uses the image alone"
        decision = replace(decision, views=())
    console.print(f"decision: {decision} ({source})", soft_wrap=True, markup=False, highlight=False)
    return decision, source


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


def _results(options: Options, restored: Restored, writer: ResultFiles, source: str) -> dict[str, Any]:
    entries = [entry for image in writer.images for entry in image["phrases"].values()]
    silent = sum(entry["mask"] is None for entry in entries) + sum(not image["phrases"] for image in writer.images)
    return {
        "run": restored.manifest.name,
        "fingerprint": restored.manifest.fingerprint,
        "decode": options.decode,
        "question": options.question,
        "threshold": writer.decision.threshold,
        "decision": writer.decision.to_json(),
        "decision_source": source,
        "probability_files": f"16-bit grey PNG; probability = value / {WHITE}",
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
