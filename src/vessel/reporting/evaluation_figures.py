"""Figures of the report of an evaluation: patients, curves, images."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vessel.errors import VesselError
from vessel.metrics.summary import read_per_image_csv
from vessel.reporting.blocks import Block, Details, Drawing, FigureRow, Picture, Text
from vessel.reporting.svg import patient_figure, reliability_figure, threshold_figure
from vessel.reporting.tables import ALL, HEADLINE, Units, patient_tables, phrase_name, plural, shown_phrases

_PANELS = {"best": "Best image", "median": "Median image", "worst": "Worst image", "first": "Not chosen by score"}


def patient_blocks(
    report: Mapping[str, Any], units: Units, images: Mapping[str, Mapping[str, Sequence[float]]], mark: str
) -> list[Block]:
    """Draw a dot for each patient and image, for all phrases and for each phrase."""
    patients = report.get("patients") or {}
    drawn = [
        _patient_drawing(report, phrase, images.get(phrase, {}), mark, number)
        for number, phrase in enumerate(shown_phrases(patients))
        if patients[phrase].get(HEADLINE)
    ]
    if not drawn:
        return [Text(("No patient was scored.",))]
    blocks: list[Block] = [drawn[0]]
    if len(drawn) > 1:
        blocks.append(Details("Each phrase by itself", drawn[1:]))
    return [*blocks, Details("The same in numbers", patient_tables(patients, units, metric=HEADLINE, mark=mark))]


def _patient_drawing(
    report: Mapping[str, Any], phrase: str, images: Mapping[str, Sequence[float]], mark: str, number: int
) -> Drawing:
    means = report["patients"][phrase][HEADLINE]
    entry = report["summary"][phrase][HEADLINE]
    interval = None if entry["low"] is None else (entry["low"], entry["high"])
    svg = patient_figure(means, images, centre=entry["mean"], interval=interval, label="Dice")
    n = len(means)
    alt = f"Dice of {phrase_name(phrase)} for {n} {plural('patient', n)}, from {min(means.values()):.3f} to "
    alt += f"{max(means.values()):.3f}; the mean of the set is {entry['mean']:.3f}."
    caption = f"Dice of {phrase_name(phrase)}: {n} {plural('patient', n)}, sorted; {entry['n_images']} images."
    return Drawing(f"patients_{number}", svg, alt, caption, mark)


def image_values(file: Path, stated: str | None) -> dict[str, dict[str, list[float]]]:
    """Read the Dice of images by phrase and patient; for `all` the value of an image is the mean over its phrases.

    Args:
        file: per_image.csv; there are no values where it does not exist.
        stated: its SHA-256 in metrics.json.

    Raises:
        VesselError: it is not the file that metrics.json was made with.
    """
    if not file.is_file():
        return {}
    if stated is not None and hashlib.sha256(file.read_bytes()).hexdigest() != stated:
        raise VesselError(f"{file} is not the one that metrics.json was made with; evaluate again with overwrite=true")
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    of_image: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in read_per_image_csv(file):
        if (value := getattr(row.scores, HEADLINE)) is not None:
            found[row.phrase][row.patient].append(value)
            of_image[row.patient, row.id].append(value)
    for (patient, _), values in of_image.items():
        found[ALL][patient].append(fmean(values))
    return found


def curve_blocks(report: Mapping[str, Any], mark: str) -> list[Block]:
    """Draw the curve that the threshold was chosen on, and the calibration of the probabilities."""
    chosen = report["threshold"]
    curves: list[Block] = []
    if curve := report.get("curve"):
        alt = "Dice, IoU, precision and recall against the threshold"
        alt += "." if chosen is None else f"; {chosen:.2f} is marked."
        caption = "Validation images, plain means over images; a dotted line marks the threshold in use."
        curves.append(Drawing("threshold", threshold_figure(curve, chosen), alt, caption, mark))
    reliable = {
        phrase: bins for phrase, bins in (report.get("reliability") or {}).items() if any(one["n"] for one in bins)
    }
    drawn = [
        _reliability_drawing(phrase, reliable[phrase], mark, number)
        for number, phrase in enumerate(shown_phrases(reliable))
    ]
    curves += drawn[:1]
    blocks: list[Block] = [FigureRow(curves)] if curves else [Text(("This run kept no curve of its validation.",))]
    if len(drawn) > 1:
        blocks.append(Details("Calibration of each phrase", [FigureRow(drawn[1:])]))
    return blocks


def _reliability_drawing(phrase: str, bins: Sequence[Mapping[str, Any]], mark: str, number: int) -> Drawing:
    pixels = sum(one["n"] for one in bins)
    alt = f"Share of true pixels against the predicted probability, {phrase_name(phrase)}, {pixels} pixels in "
    alt += f"{len(bins)} bins."
    caption = f"Calibration, {phrase_name(phrase)}: on the dashed line the share of true pixels equals the probability."
    return Drawing(f"reliability_{number}", reliability_figure(bins), alt, caption, mark)


def panel_blocks(report: Mapping[str, Any], folder: Path, units: Units) -> list[Block]:
    """Collect the panels that the evaluation drew: the best, the median and the worst image, and the first ones."""
    pictures: dict[str, list[Picture]] = {kind: [] for kind in _PANELS}
    for panel in report.get("panels") or ():
        name = Path(panel["file"]).name
        file = folder / "panels" / name
        kind = panel["kind"].split("_")[0]
        if kind not in pictures or not file.is_file():
            continue
        dice = "" if panel.get("dice") is None else f", Dice {units.number(HEADLINE, panel['dice']).text}"
        caption = f"{_PANELS[kind]}: {panel['id']}{dice}"
        alt = f"{caption}. Image, ground truth, probability, and the agreement of prediction and ground truth."
        pictures[kind].append(Picture(f"panels/{name}", file.read_bytes(), alt, caption))
    first = pictures.pop("first")
    blocks: list[Block] = [one for of_kind in pictures.values() for one in of_kind]
    if first:
        blocks.append(Details(f"The first {len(first)} of the part, at any score", first))
    if not blocks:
        return [Text(("No panels were drawn.",))]
    colours = "Green: vessel found; orange-red: false positive; blue: false negative. Ids are pseudonyms."
    return [Text((colours,)), *blocks]
