"""The report of one evaluation: every number comes from its metrics.json, every dot from its per_image.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vessel.reporting.blocks import Block, Details, Number, Page, Prose, Section, Text
from vessel.reporting.claim_checklist import claim_table
from vessel.reporting.evaluation_figures import curve_blocks, image_values, panel_blocks, patient_blocks
from vessel.reporting.provenance import data_blocks, decision_blocks, failure_blocks, run_blocks
from vessel.reporting.tables import (
    ALL,
    ARROWS,
    HEADLINE,
    Units,
    part_name,
    plain_means,
    plural,
    score_tables,
    spacing_text,
)

_MARKS = {
    "block": "split by blocks of frames, not by patient",
    "frame": "split by frame, not by patient",
}
_FEW_PATIENTS = 10


def report_page(report: Mapping[str, Any], folder: Path) -> Page:
    """Make the page of report.html and report.md.

    Args:
        report: the content of metrics.json.
        folder: the results folder, for per_image.csv and panels.
    """
    units = Units(report.get("metrics") or {}, report.get("length_unit") or "px")
    mark = split_mark(report)
    warnings = _warnings(report)
    images = image_values(folder / "per_image.csv", report.get("rows_hash"))
    sections = [
        Section("scores", "Scores", _scores(report, units, mark)),
        Section("patients", "Patients", patient_blocks(report, units, images, mark)),
        Section("threshold", "Threshold and calibration", curve_blocks(report, mark)),
        Section("images", "Images", panel_blocks(report, folder, units)),
        Section("failures", "Failures", failure_blocks(report)),
        Section("decision", "From probability to mask", decision_blocks(report, mark)),
        Section("data", "Data and split", data_blocks(report)),
        Section("run", "Weights and run", run_blocks(report)),
        Section("claim", "CLAIM checklist", [claim_table(report, warnings)]),
    ]
    return Page(
        kicker=kicker("Evaluation", report),
        title=f"{report['run']} on {report['data']['name']}",
        lead=_lead(report, units),
        facts=_facts(report, units),
        warnings=warnings,
        sections=sections,
        foot="Every number comes from metrics.json beside this file, and every dot from per_image.csv; the exact value "
        "of a rounded number is kept in the page. For research, not for clinical use.",
    )


def kicker(what: str, content: Mapping[str, Any]) -> str:
    """Write the line above the title: kind of page, part of the data set, day."""
    part = part_name(content).removeprefix("the ")
    return f"{what} · {part} · {str(content.get('created') or '')[:10]}".rstrip(" ·")


def split_mark(report: Mapping[str, Any]) -> str:
    """Return the mark of the tables when the parts of the data set have patients in common, else an empty text."""
    return _MARKS.get(str(report.get("unit")), "")


def mark_warning(mark: str) -> str:
    """Write the mark as a sentence."""
    return f"The data set is {mark}: scores say little about new patients. Each table carries this mark."


def _headline(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    entry = ((report.get("summary") or {}).get(ALL) or {}).get(HEADLINE)
    return entry if entry and entry["mean"] is not None else None


def _lead(report: Mapping[str, Any], units: Units) -> Prose:
    entry = _headline(report)
    if entry is None:
        n = report["n_failed"]
        return (f"No image of {part_name(report)} could be scored; ", Number(str(n), n), " failed.")
    phrases = [name for name in report["summary"] if name != ALL]
    over = f" over {len(phrases)} phrases" if len(phrases) > 1 else ""
    spread: Prose = (" (no interval: there is nothing to draw from)",)
    if entry["low"] is not None:
        spread = (f" (95 % interval over {entry['unit']}s ", *units.interval(HEADLINE, entry), ")")
    return (
        f"On {part_name(report)} of {report['data']['name']} the mean Dice{over} is ",
        units.number(HEADLINE, entry["mean"]),
        *spread,
        ", from ",
        Number(str(entry["n_images"]), entry["n_images"]),
        f" {plural('image', entry['n_images'])} of ",
        Number(str(entry["n_patients"]), entry["n_patients"]),
        f" {plural('patient', entry['n_patients'])}.",
    )


def _facts(report: Mapping[str, Any], units: Units) -> list[tuple[str, Prose]]:
    entry = _headline(report)
    facts: list[tuple[str, Prose]] = []
    if entry is not None:
        facts.append(("Dice", (units.number(HEADLINE, entry["mean"]),)))
        if entry["low"] is not None:
            facts.append(("95 % interval", units.interval(HEADLINE, entry)))
        facts.append(("Patients", (Number(str(entry["n_patients"]), entry["n_patients"]),)))
    facts.append(("Images scored", (Number(str(report["n_ok"]), report["n_ok"]),)))
    facts.append(("Failed", (Number(str(report["n_failed"]), report["n_failed"]),)))
    if report["threshold"] is not None:
        facts.append(("Threshold", (Number(f"{report['threshold']:.2f}", report["threshold"]),)))
    return facts


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """List the notes above all numbers; `note` is that of the evaluation itself."""
    warnings = [str(report["note"])] if report.get("note") else []
    if mark := split_mark(report):
        warnings.append(mark_warning(mark))
    entry = _headline(report)
    if entry is not None and entry["unit"] != "patient":
        warnings.append(
            f"All images are of one patient, so intervals are over {entry['unit']}s: they do not cover the differences "
            "between patients."
        )
    elif entry is not None and entry["n_patients"] < _FEW_PATIENTS:
        warnings.append(f"{entry['n_patients']} patients are few; their intervals are wide for that reason.")
    if n := report["n_failed"]:
        warnings.append(f"{n} {plural('image', n)} failed and {'is' if n == 1 else 'are'} in no score; see Failures.")
    if report.get("seg_missing") and "[SEG]" not in str(report.get("note")):
        warnings.append(f"The network did not emit [SEG] for {100 * report['seg_missing']:.1f} % of the phrases.")
    if len(uses := report.get("test_uses") or ()) > 1:
        warnings.append(
            f"The test part was used {len(uses)} times by this run; each use is listed under Data and split."
        )
    return warnings


def _scores(report: Mapping[str, Any], units: Units, mark: str) -> list[Block]:
    summary = report.get("summary") or {}
    if not summary:
        return [Text(("Nothing was scored.",))]
    entry = _headline(report)
    over = "" if entry is None else f", with 95 % bootstrap intervals over {entry['unit']}s"
    blocks: list[Block] = [
        *score_tables(summary, units, caption=f"Mean scores{over}", mark=mark),
        Text(
            (
                f"{ARROWS} A mean is taken over the images of a video, then the videos of a patient, then patients. "
                f"{_distances(report, units)}",
            )
        ),
        Details("Plain means over images", plain_means(summary, units, mark=mark)),
    ]
    return blocks


def _distances(report: Mapping[str, Any], units: Units) -> str:
    if "nsd" not in units.metrics or report.get("tolerance") is None:
        return ""
    spacing, unit = report.get("pixel_spacing"), units.length
    known = "the data set states no pixel spacing" if spacing is None else f"a pixel is {spacing_text(spacing)}"
    return f"Distances are in {unit}: {known}. {units.title('nsd')} tolerates {report['tolerance']:g} {unit}."
