"""Tables of scores, from the summary that a results file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vessel.reporting.blocks import Cell, Number, Prose, Table, cell

ALL, HEADLINE, POOLED = "all", "dice", "pooled"
NBSP = "\N{NO-BREAK SPACE}"
ARROWS = "↑ higher is better, ↓ lower is better."
_COLUMNS = 5  # a page of A4 holds no more beside the names


class Units:
    """The decimals, units and titles of the scores of a file."""

    def __init__(self, metrics: Mapping[str, Mapping[str, str]], length: str) -> None:
        self.metrics = metrics
        self.length = length

    def title(self, metric: str) -> str:
        """Return the title of a metric, such as Dice."""
        return self.metrics[metric]["title"]

    def metric_cell(self, metric: str, note: int = 0) -> Cell:
        """Make the head of a row: title with an arrow in the direction of better values, and the unit below."""
        arrow = "↑" if self.metrics[metric]["better"] == "higher" else "↓"
        unit = self.unit(metric)
        return Cell((f"{self.title(metric)}{NBSP}{arrow}",), (unit,) if unit else (), note)

    def unit(self, metric: str) -> str:
        """Return the unit of a metric; empty for a ratio."""
        return {"length": self.length, "count": "count"}.get(self.metrics[metric]["unit"], "")

    def number(self, metric: str, value: float, *, signed: bool = False) -> Number:
        """Format a value: three decimals for ratios and differences, two for lengths and counts; a true minus sign."""
        decimals = 3 if signed or not self.metrics[metric]["unit"] else 2
        text = f"{value:+.{decimals}f}" if signed and value else f"{value:.{decimals}f}"
        return Number(text.replace("-", "−"), value)

    def interval(self, metric: str, entry: Mapping[str, Any], *, signed: bool = False) -> Prose:
        """Write an interval on one line, or that there is none."""
        if entry["low"] is None:
            return ("no interval",)
        low, high = (self.number(metric, entry[end], signed=signed) for end in ("low", "high"))
        return (low, f"{NBSP}to{NBSP}", high)


def shown_phrases(summary: Mapping[str, Any]) -> list[str]:
    """List the phrases of a table: `all` first; a single phrase alone, since `all` would repeat it."""
    phrases = [name for name in summary if name != ALL]
    return phrases if len(phrases) == 1 else [*([ALL] if ALL in summary else []), *phrases]


def column_parts(phrases: Sequence[str]) -> list[Sequence[str]]:
    """Divide the phrases over tables, so that none is too wide for paper."""
    return [phrases[at : at + _COLUMNS] for at in range(0, len(phrases), _COLUMNS)]


def phrase_name(phrase: str) -> str:
    """Return the name of a phrase in the head of a table."""
    return "all phrases" if phrase == ALL else phrase


def score_tables(summary: Mapping[str, Any], units: Units, *, caption: str, mark: str) -> list[Table]:
    """Make tables of mean, interval and counts of every score and phrase; several where one is too wide for paper.

    Args:
        summary: `summary[<phrase or all>][<metric>]` as `vessel.metrics.summary.summarise` gives it.
        units: decimals, units and titles.
        caption: of the first table.
        mark: on each of them.
    """
    phrases = shown_phrases(summary)
    parts = column_parts(phrases)
    titles = [caption] + [f"{caption}, continued" for _ in parts[1:]]
    return [_score_table(summary, part, units, title, mark) for part, title in zip(parts, titles, strict=True)]


def _score_table(summary: Mapping[str, Any], phrases: Sequence[str], units: Units, caption: str, mark: str) -> Table:
    rules = list(dict.fromkeys(units.metrics[metric]["rule"] for metric in units.metrics))
    usual = {phrase: _usual(summary[phrase]) for phrase in phrases}
    rows: list[list[Cell]] = []
    for metric in units.metrics:
        entries = [summary[phrase].get(metric) for phrase in phrases]
        if not any(entries):
            continue
        name = units.metric_cell(metric, rules.index(units.metrics[metric]["rule"]) + 1)
        scores = [_score(entry, usual[p], metric, units) for entry, p in zip(entries, phrases, strict=True)]
        rows.append([name, *scores])
        if any(_counts_absence(entry) for entry in entries):
            head_present = Cell((f"{units.title(metric)} where present",), tone="quiet")
            rows.append([head_present, *_present(entries, metric, units)])
    head = [cell(""), *(Cell((phrase_name(p),), _counts(usual[p])) for p in phrases)]
    return Table(caption, head, rows, mark, rules)


def _usual(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the entry with the most images; cells of the others state their smaller number."""
    return max(entries.values(), key=lambda entry: entry["n_images"], default={})


def _counts(entry: Mapping[str, Any]) -> Prose:
    if not entry:
        return ("nothing scored",)
    names = {"n_images": "image", "n_videos": "video", "n_patients": "patient"}
    parts: list[str | Number] = []
    for key, name in names.items():
        if key in entry:
            parts += [Number(str(entry[key]), entry[key]), f" {plural(name, entry[key])}, "]
    return (*parts, "present in ", Number(str(entry["n_present"]), entry["n_present"]))


def _score(entry: Mapping[str, Any] | None, usual: Mapping[str, Any], metric: str, units: Units) -> Cell:
    if not entry or entry["mean"] is None:
        return cell("not defined", tone="quiet")
    under = [*units.interval(metric, entry)]
    if entry["unit"] != usual["unit"]:
        under.append(f", over {entry['unit']}s")
    if entry["n_images"] != usual["n_images"]:
        under += [", n = ", Number(str(entry["n_images"]), entry["n_images"])]
    return Cell((units.number(metric, entry["mean"]),), tuple(under))


def _counts_absence(entry: Mapping[str, Any] | None) -> bool:
    """Return whether the mean counts images that do not show the phrase, and there is one that does not."""
    return entry is not None and "mean_present" in entry and entry["n_present"] < entry["n_images"]


def _present(entries: Sequence[Mapping[str, Any] | None], metric: str, units: Units) -> list[Cell]:
    cells = []
    for entry in entries:
        value = (entry or {}).get("mean_present")
        cells.append(cell("none shows it", tone="quiet") if value is None else Cell((units.number(metric, value),)))
    return cells


def plain_means(summary: Mapping[str, Any], units: Units, *, mark: str) -> list[Table]:
    """Make tables of means in which each image counts once, as many papers report them."""
    tables = []
    for part in column_parts(shown_phrases(summary)):
        rows = []
        for metric in units.metrics:
            means = [(summary[phrase].get(metric) or {}).get("mean_images") for phrase in part]
            rows.append([units.metric_cell(metric), *(_plain(mean, metric, units) for mean in means)])
        head = [cell(""), *(cell(phrase_name(phrase)) for phrase in part)]
        tables.append(Table("Means over images: patients with many images weigh more", head, rows, mark))
    return tables


def _plain(mean: float | None, metric: str, units: Units) -> Cell:
    return cell("–", tone="quiet") if mean is None else Cell((units.number(metric, mean),))


def patient_tables(patients: Mapping[str, Any], units: Units, *, metric: str, mark: str) -> list[Table]:
    """Make tables of the mean of every patient and phrase, one for each `_COLUMNS` phrases."""
    phrases = shown_phrases(patients)
    names = sorted({name for phrase in phrases for name in patients[phrase].get(metric) or {}})
    tables = []
    for part in column_parts(phrases):
        means = [patients[phrase].get(metric) or {} for phrase in part]
        rows = [[cell(name), *(_plain(of.get(name), metric, units) for of in means)] for name in names]
        head = [cell("patient"), *(cell(phrase_name(phrase)) for phrase in part)]
        tables.append(Table(f"Mean {units.title(metric)} of each patient", head, rows, mark))
    return tables


def part_name(content: Mapping[str, Any]) -> str:
    """Describe the images of the data set that were scored."""
    return "all folds" if content.get("fold") == POOLED else f"the {content['split']} part"


def plural(noun: str, n: int) -> str:
    """Return the noun in the form that agrees with the number."""
    return noun if n == 1 else f"{noun}s"


def spacing_text(spacing: Sequence[float]) -> str:
    """Describe row and column spacing."""
    return f"{spacing[0]:g} × {spacing[1]:g} mm (row × column)"
