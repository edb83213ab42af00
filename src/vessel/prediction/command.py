"""Masks, probabilities and overlays for images without truth, and `results.json`, which says what they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from vessel.batch import Sample
from vessel.data.catalog import slug
from vessel.data.inputs import InputImage, find_images, requested_phrases
from vessel.data.questions import check_question
from vessel.errors import VesselError
from vessel.files import write_json
from vessel.inference.decision import AUTO, Decision, override_decision, read_given_decision
from vessel.inference.loading import LoadedModel, load_model
from vessel.inference.options import choose_device
from vessel.inference.predictor import Predictor
from vessel.inference.pullbacks import Pullback, find_pullbacks, segment_pullback
from vessel.inference.samples import phrase_sample_loader, question_sample_loader
from vessel.model.baselines import require_known
from vessel.paths import expanded
from vessel.prediction.files import NO_SEG, WHITE, WRITERS, ResultFiles
from vessel.prediction.options import PredictOptions
from vessel.prediction.request import FOLDERS, RESULTS_FILE, check
from vessel.processes.pool import in_processes

IMAGES_A_WORKER = 16  # fewer are loaded before a process has started
SHARED_MEMORY = Path("/dev/shm")


def predict(options: PredictOptions) -> Mapping[str, Any]:
    """Predict, write and print; results are written as they come.

    Returns:
        the content of results.json.

    Raises:
        VesselError: the checkpoint, an option, the images or the results folder will not do, a process died, or every
            image failed.
    """
    check(options)
    targets = find_images(options.images, split=options.split, beside=options.target)
    shown: Sequence[InputImage | Pullback] = find_pullbacks(options.images, targets) if options.video else targets
    count = _processes(options, len(shown))
    shares = [partial(_predict_share, options, shown[index::count], index=index, of=count) for index in range(count)]
    results = _merged(in_processes(shares, partial(_make_place, options)), shown)
    # Last: a folder with results.json is a whole one.
    write_json(options.target / RESULTS_FILE, results)
    _tell(results, options.target, Console())
    if not results["n_ok"]:
        raise VesselError(f"none of {len(targets)} images gave a result; the first: {results['failures'][0]['reason']}")
    return results


def _processes(options: PredictOptions, items: int) -> int:
    """Return the number of processes that divide the images or pullbacks, of which there is one at least.

    Raises:
        VesselError: there are not so many GPUs.
    """
    if options.devices < 1:
        raise VesselError(f"devices={options.devices}: at least one")
    if options.devices > 1 and options.network.device_map is not None:
        raise VesselError("devices= with network.device_map=: a network over several devices takes them all; give one")
    there = torch.cuda.device_count()
    if options.devices > 1 and choose_device(options.device).type == "cuda" and options.devices > there:
        raise VesselError(f"devices={options.devices}: torch finds {there} here; give as many at most")
    return min(options.devices, items)


def _predict_share(
    options: PredictOptions, shown: Sequence[InputImage | Pullback], ready: Callable[[], object], *, index: int, of: int
) -> dict[str, Any]:
    """Predict and write one share of the images or pullbacks; the first one prints for all.

    Returns:
        the content of results.json, as if this share were all.
    """
    console = Console(quiet=index > 0)
    device = _device(options, index, of)
    model = load_model(options.ckpt, options.network.load_settings(device))
    _require_language(options, model)
    for told in model.reports:
        console.print(told.table())
    phrases = _phrases(options, model, console)
    decision, source = _decision(options, model, console)
    predictor = Predictor(
        model,
        device=device,
        device_map=options.network.device_map,
        decode=options.decode,
        max_new_tokens=options.max_new_tokens,
        tta=decision.tta,
    )
    ready()
    files = ResultFiles(options.target, decision)
    doing = "predicting" if of == 1 else f"predicting, the first of {of} shares"
    tracked = partial(track, description=doing, transient=True, console=console)
    for pullback in [one for one in shown if isinstance(one, Pullback)]:
        answers = segment_pullback(predictor, pullback, phrases, question=options.question)
        files.add_pullback(pullback, tracked(answers, total=len(pullback.frames)))
    if targets := [one for one in shown if isinstance(one, InputImage)]:
        load = _loader(options, targets, phrases, model)
        workers = _workers(options, len(targets), predictor, of=of)
        answers = predictor.predict(targets, load, batch_size=options.batch_size, workers=workers)
        files.add(tracked(answers, total=len(targets)))
    return _results(options, model, files, source)


def _device(options: PredictOptions, index: int, of: int) -> torch.device:
    """Return the device that computes a shard; on a CPU the shards divide the cores."""
    device = choose_device(options.device)
    if of > 1 and device.type == "cuda":
        return torch.device("cuda", index)
    if of > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // of))
    return device


def _workers(options: PredictOptions, images: int, predictor: Predictor, *, of: int = 1) -> int:
    """Loader processes: those asked for, but none that would start in vain or find no shared memory to hand images on.

    PyTorch would then wait for ever; containers often have 64 MB.
    """
    if not SHARED_MEMORY.is_dir():
        return min(options.workers, images // IMAGES_A_WORKER)
    geometry, ahead = predictor.geometry, 2  # batches of a worker that wait, as the DataLoader has it
    sample = 3 * (geometry.tile_size**2 * (geometry.max_tiles + 1) + geometry.frame_size**2)
    batch = max(options.batch_size, 1 + len(predictor.augmented))
    # Of each of the processes: what is computed, and what waits to be written, still lies there too.
    free = shutil.disk_usage(SHARED_MEMORY).free // of - (2 * batch + WRITERS + 1) * sample
    return min(options.workers, images // IMAGES_A_WORKER, max(0, free) // (ahead * batch * sample))


def _require_language(options: PredictOptions, model: LoadedModel) -> None:
    asked = {
        "question=": options.question,
        "video=true": options.video,
        "decode=generate": options.decode == "generate",
    }
    if needs := [option for option, given in asked.items() if given]:
        model.require_language(needs[0])


def _phrases(options: PredictOptions, model: LoadedModel, console: Console) -> tuple[str, ...]:
    """Return the phrases to segment; none with a free question."""
    if options.question is not None:
        check_question(options.question, model.prompt)
        return ()
    known = model.manifest.phrases
    phrases = requested_phrases(options.phrases, known, model.prompt)
    if not phrases:
        raise VesselError(f"phrases= is missing: ckpt={options.ckpt} does not say what it was trained to segment")
    if len({slug(phrase) for phrase in phrases}) < len(phrases):
        raise VesselError(f"phrases={list(phrases)}: two of them would share a folder; ask for one at a time")
    require_known(model.network, phrases)
    if known and (new := [phrase for phrase in phrases if phrase not in known]):
        told = f"warning: never trained on {', '.join(new)}; it was on {', '.join(known)}"
        console.print(told, style="yellow", soft_wrap=True)
    return phrases


def _loader(
    options: PredictOptions, targets: Sequence[InputImage], phrases: Sequence[str], model: LoadedModel
) -> Callable[[int], Sample]:
    if options.question is None:
        return phrase_sample_loader(targets, phrases, model)
    regions = None if options.mask_prompts is None else expanded(options.mask_prompts)
    return question_sample_loader(targets, options.question, model, regions=regions)


def _decision(options: PredictOptions, model: LoadedModel, console: Console) -> tuple[Decision, str]:
    """Combine what validation chose with the user's options, and describe where it comes from."""
    alone = "video=true" if options.video else f"decode={options.decode}" if options.decode != "forced" else None
    if alone and options.tta not in (AUTO, None, []):
        raise VesselError(f"tta= with {alone}: several predictions make no one answer; use decode=forced without video")
    chosen, source = model.decision, model.decision_source
    if options.decision is not None:
        chosen, source = read_given_decision(options.decision, model.manifest)
    asked = {
        "threshold": options.threshold,
        "hysteresis": options.hysteresis,
        "cleanup": options.cleanup,
        "tta": options.tta,
    }
    decision = override_decision(chosen, **asked)
    if decision != chosen:
        source = f"the user's; validation: {chosen}, {source}"
    if alone and decision.tta:
        source += f"; {alone} uses the image alone"
        decision = replace(decision, tta=())
    console.print(f"decision: {decision} ({source})", soft_wrap=True, markup=False, highlight=False)
    return decision, source


def _make_place(options: PredictOptions) -> None:
    (options.target / RESULTS_FILE).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(options.target / name, ignore_errors=True)
        (options.target / name).mkdir(parents=True)


def _results(options: PredictOptions, model: LoadedModel, files: ResultFiles, source: str) -> dict[str, Any]:
    entries = [entry for image in files.images for entry in image["phrases"].values()]
    silent = sum(entry["mask"] is None for entry in entries) + sum(not image["phrases"] for image in files.images)
    return {
        "run": model.manifest.name,
        "fingerprint": model.manifest.fingerprint,
        "decode": options.decode,
        "question": options.question,
        "threshold": files.decision.threshold,
        "decision": files.decision.to_json(),
        "decision_source": source,
        "probability_files": f"16-bit grey PNG; probability = value / {WHITE}",
        "area_unit": "pixels",
        "n_ok": len(files.images),
        "n_failed": len(files.failures),
        "n_without_mask": silent,
        "failures": [asdict(failure) for failure in files.failures],
        "pullbacks": files.pullbacks,
        "images": files.images,
    }


def _merged(shares: Sequence[Mapping[str, Any]], shown: Sequence[InputImage | Pullback]) -> dict[str, Any]:
    """The results of all shares, in the order of the images or pullbacks."""
    frames = [frame for one in shown for frame in (one.frames if isinstance(one, Pullback) else (one,))]
    merged = dict(shares[0])
    for count in ("n_ok", "n_failed", "n_without_mask"):
        merged[count] = sum(share[count] for share in shares)
    for name, order in (("failures", shown), ("pullbacks", shown), ("images", frames)):
        found = {entry["id"]: entry for share in shares for entry in share[name]}
        merged[name] = [found[one.id] for one in order if one.id in found]
    return merged


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
