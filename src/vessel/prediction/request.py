"""Check the options of vessel.predict before anything heavy is imported."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from vessel.errors import VesselError
from vessel.inference.decoders import DECODERS
from vessel.paths import expanded

RESULTS_FILE = "results.json"
FOLDERS = ("masks", "probabilities", "overlays")


def check(options: Any) -> None:
    """Refuse options that contradict each other, and places that will not do.

    Args:
        options: `vessel.prediction.options.Options`, or the configuration with the same names.

    Raises:
        VesselError: names the option.
    """
    if options.decode not in DECODERS:
        raise VesselError(f"decode={options.decode}: choose one of {', '.join(DECODERS)}")
    place = expanded(str(options.images))  # Hydra reads 2024 as a number
    if not place.exists() and not glob.has_magic(str(place)):
        raise VesselError(f"images={options.images}: no such file or folder")
    _check_question(options)
    _check_free(options.out, expanded(str(options.out)), overwrite=options.overwrite)


def _check_question(options: Any) -> None:
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
    if options.mask_prompts is not None and not expanded(str(options.mask_prompts)).is_dir():
        raise VesselError(f"mask_prompts={options.mask_prompts}: name a folder of masks; `--help` says their names")


def _check_free(named: str, out: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds anything but results which the user wants replaced."""
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or there - {*FOLDERS, RESULTS_FILE}:
        raise VesselError(f"out={named} holds more than results of vessel.predict; choose another folder")
    if there and not overwrite:
        raise VesselError(f"out={named} holds results already; choose another folder, or say overwrite=true")
