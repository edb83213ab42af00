"""Results folders: refuse one with other results, and write new results whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vessel.errors import VesselError
from vessel.evaluation.metrics_json import Part
from vessel.evaluation.results import METRICS_FILE
from vessel.files import flush, put_in_place
from vessel.privacy.scanner import Scanner
from vessel.privacy.texts import texts_of
from vessel.runs.manifest import Manifest


def require_own(out: Path, manifest: Manifest, part: Part) -> None:
    """Refuse a folder that holds the results of another checkpoint, part or data set.

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
    """Write results into an empty folder beside `out`, and move them there at the end.

    What has the same names in `out` is replaced, and everything else there stays. After an error in the block, or where
    the content holds a raw identifier, nothing in `out` has changed.

    Args:
        out: the results folder.
        data: the data sets whose names must not be in it; without one it is searched by patterns only.

    Raises:
        VesselError: naming the file that holds a name or an id of a patient.
    """
    stage = out.with_name(f".{out.name}.part")
    aside = out.with_name(f".{out.name}.old")
    for leftover in (stage, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        for root in data or (None,):
            Scanner.beside(root).require_clean(texts_of(stage), doing="the report")
        flush(stage)
        out.mkdir(exist_ok=True)
        # metrics.json is removed first and moved last: a folder with metrics.json is a whole one.
        (out / METRICS_FILE).unlink(missing_ok=True)
        for made in sorted(stage.iterdir(), key=lambda path: path.name == METRICS_FILE):
            put_in_place(made, out / made.name, aside)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
