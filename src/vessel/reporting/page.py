"""Write reports from the files of a results folder: one self-contained HTML file, and Markdown."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vessel.files import read_json
from vessel.reporting.blocks import Page, drawings
from vessel.reporting.comparison_page import comparison_page
from vessel.reporting.evaluation_page import report_page
from vessel.reporting.svg import themed

_WRITTEN = "vessel.evaluate writes it"
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path) -> list[Path]:
    """Write report.html, report.md and the figures that the latter shows, from `metrics.json` of a results folder.

    Args:
        folder: that `vessel.evaluate` wrote: metrics.json, per_image.csv, panels/.

    Returns:
        the files written, the page last.

    Raises:
        VesselError: metrics.json is not there or cannot be read, or per_image.csv is not the one it was made with.
    """
    return _write(report_page(read_json(folder / "metrics.json", _WRITTEN), folder), folder, "report")


def write_comparison(folder: Path) -> list[Path]:
    """Write comparison.html, comparison.md and its figures, from `comparison.json`.

    Returns:
        the files written, the page last.

    Raises:
        VesselError: comparison.json is not there or cannot be read.
    """
    return _write(comparison_page(read_json(folder / "comparison.json", _WRITTEN)), folder, "comparison")


def _write(page: Page, folder: Path, name: str) -> list[Path]:
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for old in figures.glob(f"{name}_*.svg"):
        old.unlink()
    written = []
    for section in page.sections:
        for drawing in drawings(section.blocks):
            file = figures / f"{name}_{drawing.name}.svg"
            file.write_text(drawing.svg, encoding="utf-8")
            written.append(file)
    for ending in ("md", "html"):
        file = folder / f"{name}.{ending}"
        file.write_text(_rendered(page, ending, name), encoding="utf-8")
        written.append(file)
    return written


def _rendered(page: Page, ending: str, name: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=ending == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["themed"] = lambda svg, prefix: Markup(themed(svg, prefix))
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["md"] = _markdown
    style = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    text = environment.get_template(f"page.{ending}.j2").render(page=page, style=style, name=name)
    return re.sub(r"\n{3,}", "\n\n", text) if ending == "md" else text


def _markdown(value: object) -> str:
    """Escape a value for Markdown and its tables, so that none of it is taken for markup."""
    text = re.sub(r"[\r\n\t]+", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)
