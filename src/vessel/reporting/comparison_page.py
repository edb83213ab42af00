"""The report of a comparison: paired differences between runs, from comparison.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vessel.reporting.blocks import (
    Block,
    Cell,
    Details,
    Drawing,
    Number,
    Page,
    Prose,
    Section,
    Table,
    Text,
    cell,
    facts_table,
)
from vessel.reporting.evaluation_page import kicker, mark_warning, split_mark
from vessel.reporting.svg import patient_figure
from vessel.reporting.tables import (
    ALL,
    ARROWS,
    HEADLINE,
    NBSP,
    Units,
    column_parts,
    phrase_name,
    plural,
    score_tables,
    shown_phrases,
)

_TONES = {"better": "good", "worse": "bad"}
_MOST_SENTENCES = 3
Pairs = dict[tuple[str, str], dict[str, dict[str, Mapping[str, Any]]]]


def comparison_page(comparison: Mapping[str, Any]) -> Page:
    """Make the page of comparison.html and comparison.md."""
    units = Units(comparison["metrics"], comparison.get("length_unit") or "px")
    mark = split_mark(comparison)
    pairs = _pairs(comparison["differences"])
    names = [run["run"] for run in comparison["runs"]]
    data = comparison.get("data") or {}
    return Page(
        kicker=kicker("Comparison", comparison),
        title=f"{len(names)} runs on {data.get('name')}",
        lead=_lead(pairs, units),
        facts=_facts(comparison),
        warnings=_warnings(comparison, mark),
        sections=[
            Section("runs", "Runs", _runs(comparison, units, mark)),
            Section("differences", "Paired differences", _differences(pairs, units, mark)),
            Section("patients", "Patients", _patients(pairs, mark)),
            Section("data", "Data", _data(comparison)),
        ],
        foot="Every number comes from comparison.json beside this file; the exact value of a rounded number is kept in "
        "the page. For research, not for clinical use.",
    )


def _pairs(differences: Sequence[Mapping[str, Any]]) -> Pairs:
    """Group the entries by pair, phrase and metric, in the order of the file."""
    pairs: Pairs = {}
    for entry in differences:
        of_pair = pairs.setdefault((str(entry["a"]), str(entry["b"])), {})
        of_pair.setdefault(entry["phrase"], {})[entry["metric"]] = entry
    return pairs


def _lead(pairs: Pairs, units: Units) -> Prose:
    """Write the Dice of the first pairs, which are those with the reference."""
    sentences: list[str | Number] = []
    for (a, b), phrases in list(pairs.items())[:_MOST_SENTENCES]:
        entry = (phrases.get(ALL) or next(iter(phrases.values()))).get(HEADLINE)
        if not entry or entry["mean"] is None:
            continue
        sentences += [f"{b} against {a}: Dice ", units.number(HEADLINE, entry["mean"], signed=True)]
        if entry["low"] is not None:
            sentences += [" (95 % interval ", *units.interval(HEADLINE, entry, signed=True), ")"]
        sentences.append(f", {entry['verdict']}. ")
    return tuple(sentences) or ("Nothing could be compared.",)


def _facts(comparison: Mapping[str, Any]) -> list[tuple[str, Prose]]:
    facts: list[tuple[str, Prose]] = [("Runs", (str(len(comparison["runs"])),))]
    for label, key in (("Images in all runs", "n_images"), ("Patients", "n_patients")):
        if comparison.get(key) is not None:
            facts.append((label, (Number(str(comparison[key]), comparison[key]),)))
    return facts


def _warnings(comparison: Mapping[str, Any], mark: str) -> list[str]:
    notes = [str(comparison["note"])] if comparison.get("note") else []
    return [*notes, mark_warning(mark)] if mark else notes


def _runs(comparison: Mapping[str, Any], units: Units, mark: str) -> list[Block]:
    """Make a table of the Dice of each run, a column a phrase; below, all scores of each run."""
    runs = comparison["runs"]
    phrases = shown_phrases(runs[0].get("summary") or {}) if runs else []
    blocks: list[Block] = []
    for part in column_parts(phrases):
        rows = [[_run_name(run), *(_dice(run["summary"], phrase, units) for phrase in part)] for run in runs]
        head = [cell("run"), *(cell(phrase_name(phrase)) for phrase in part)]
        blocks.append(Table("Mean Dice with its 95 % interval", head, rows, mark))
    for run in runs:
        if summary := run.get("summary"):
            tables = score_tables(summary, units, caption=f"Mean scores of {run['run']}", mark=mark)
            blocks.append(Details(f"All scores of {run['run']}", tables))
    return blocks or [Text(("No run was scored.",))]


def _run_name(run: Mapping[str, Any]) -> Cell:
    threshold = run.get("threshold")
    under: Prose = (str(run.get("network") or ""),)
    if threshold is not None:
        under = (*under, ", threshold ", Number(f"{threshold:.2f}", threshold))
    return Cell((str(run["run"]),), under)


def _dice(summary: Mapping[str, Any], phrase: str, units: Units) -> Cell:
    entry = (summary.get(phrase) or {}).get(HEADLINE)
    if not entry or entry["mean"] is None:
        return cell("not defined", tone="quiet")
    return Cell((units.number(HEADLINE, entry["mean"]),), units.interval(HEADLINE, entry))


def _differences(pairs: Pairs, units: Units, mark: str) -> list[Block]:
    if not pairs:
        return [Text(("There are no differences.",))]
    reference = _reference(pairs)
    blocks: list[Block] = [
        Text(
            (
                "A difference is the second run minus the first, of the same images: over the images of a video, the "
                "videos of a patient, then patients. Where its interval holds 0 it is inside the noise. "
                f"{ARROWS}",
            )
        )
    ]
    for (a, b), phrases in pairs.items():
        tables = _difference_tables(a, b, phrases, units, mark)
        blocks += tables if a == reference else [Details(f"{b} against {a}", tables)]
    return blocks


def _reference(pairs: Pairs) -> str:
    return next(iter(pairs))[0] if pairs else ""


def _difference_tables(a: str, b: str, phrases: Mapping[str, Any], units: Units, mark: str) -> list[Table]:
    tables = []
    for part in column_parts(shown_phrases(phrases)):
        rows = []
        for metric in units.metrics:
            entries = [phrases[phrase].get(metric) for phrase in part]
            if any(entries):
                rows.append([units.metric_cell(metric), *(_difference(entry, metric, units) for entry in entries)])
        head = [cell(""), *(Cell((phrase_name(p),), _counted(phrases[p])) for p in part)]
        tables.append(Table(f"{b} minus {a}", head, rows, mark))
    return tables


def _counted(entries: Mapping[str, Mapping[str, Any]]) -> Prose:
    entry = max(entries.values(), key=lambda one: one["n_images"])
    images, patients = entry["n_images"], entry["n_patients"]
    return (
        Number(str(images), images),
        f" {plural('image', images)}, ",
        Number(str(patients), patients),
        f" {plural('patient', patients)}; over {entry['unit']}s",
    )


def _difference(entry: Mapping[str, Any] | None, metric: str, units: Units) -> Cell:
    if not entry or entry["mean"] is None:
        return cell("not defined", tone="quiet")
    verdict = str(entry["verdict"])
    mean = units.number(metric, entry["mean"], signed=True)
    under = (*units.interval(metric, entry, signed=True), "; ", verdict.replace(" ", NBSP))
    return Cell((mean,), under, tone=_TONES.get(verdict, "quiet"))


def _patients(pairs: Pairs, mark: str) -> list[Block]:
    """Draw the differences of each patient; the pairs without the reference are folded."""
    drawn = {pair: _pair_drawing(pair, pairs[pair], mark, number) for number, pair in enumerate(pairs)}
    first = [one for pair, one in drawn.items() if one is not None and pair[0] == _reference(pairs)]
    others = [one for pair, one in drawn.items() if one is not None and pair[0] != _reference(pairs)]
    if not first:
        return [Text(("No patient is in all runs.",))]
    return [*first, *([Details("The other pairs", others)] if others else [])]


def _pair_drawing(pair: tuple[str, str], phrases: Mapping[str, Any], mark: str, number: int) -> Drawing | None:
    phrase = ALL if ALL in phrases else next(iter(phrases))
    entry = phrases[phrase].get(HEADLINE) or {}
    means = entry.get("per_patient")
    if not means:
        return None
    interval = None if entry["low"] is None else (entry["low"], entry["high"])
    label = "difference in Dice"
    svg = patient_figure(means, {}, centre=entry["mean"], interval=interval, label=label, zero=True)
    gained = sum(1 for value in means.values() if value > 0)
    difference = f"{pair[1]} minus {pair[0]}"
    alt = f"Difference in Dice of each patient, {difference}: above 0 for {gained} of {len(means)}."
    return Drawing(f"pair_{number}", svg, alt, f"{difference}, {phrase_name(phrase)}: one dot a patient.", mark)


def _data(comparison: Mapping[str, Any]) -> list[Block]:
    data = comparison.get("data") or {}
    facts = [
        ("data set", str(data.get("name") or "")),
        ("fingerprint", str(data.get("fingerprint") or "")),
        ("part", str(comparison.get("split") or "")),
        ("split hash", str(data.get("split_hash") or "")),
        ("phrases", ", ".join(comparison.get("phrases") or ())),
    ]
    head = [cell(label) for label in ("run", "network", "weights", "read from", "failed")]
    rows = [
        [cell(run.get(key) if run.get(key) is not None else "–") for key in ("run", "network", "fingerprint", "source")]
        + [cell(run.get("n_failed") or 0)]
        for run in comparison["runs"]
    ]
    return [
        facts_table("Data that all runs were scored on", facts),
        Table("Weights of the runs", head, rows, left_aligned=True),
    ]
