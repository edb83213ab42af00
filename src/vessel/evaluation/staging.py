"""A results folder: whose results it holds, and new ones put there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vessel.errors import VesselError
from vessel.evaluation.metrics_json import Part
from vessel.evaluation.results import METRICS_FILE
from vessel.privacy.scanner import Scanner
from vessel.privacy.texts import texts_of
from vessel.runs.manifest import Manifest


def require_own(out: Path, manifest: Manifest, part: Part) -> None:
    """One folder holds the results of one checkpoint on one part of one data set.

    Raises:
        VesselError: `out` holds other results.
    """
    file = out / METRICS_FILE
    if not file.is_file():
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    if there.get("fingerprint") != manifest.fingerprint or there.get("split") != part.name:
        raise VesselError(
            f"{out} holds the results of other weights ({there.get('run')}, {there.get('fingerprint')}, "
            f"split {there.get('split')}); choose another out=, or replace them with overwrite=true"
        )
    data = there.get("data") or {}
    if data.get("fingerprint") != part.catalog.fingerprint:
        raise VesselError(
            f"{out} holds the results on another data set ({data.get('name')}, {data.get('fingerprint')}); "
            "choose another out=, or replace them with overwrite=true"
        )


@contextmanager
def staged(out: Path, *data: Path) -> Iterator[Path]:
    """An empty folder beside `out`, whose content takes the place of what has the same names there at the end.

    After an error nothing in `out` has changed. Content that holds a raw identifier is one.

    Args:
        out: the results folder.
        data: the data sets whose names must not be in it; without one it is searched by patterns only.

    Raises:
        VesselError: naming the file that holds a name or an id of a patient.
    """
    stage = out.with_name(f".{out.name}.part")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        for root in data or (None,):
            Scanner.beside(root).require_clean(texts_of(stage), doing="the report")
        out.mkdir(exist_ok=True)
        # Numbers go first and come last: a folder with metrics.json is a whole one.
        (out / METRICS_FILE).unlink(missing_ok=True)
        for made in sorted(stage.iterdir(), key=lambda path: path.name == METRICS_FILE):
            there = out / made.name
            if there.is_dir():
                shutil.rmtree(there)
            made.replace(there)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
