"""Draw the figures of a report as SVG: text stays text, equal input gives equal bytes, and colours follow the page.

A figure is drawn in light colours, so that its file can stand alone. In the page `themed` replaces each of them by a
variable of the style sheet, which has dark ones as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from vessel.plotting.colours import BLUE, CURVE_LABELS, CURVES, GREEN, ORANGE, VERMILLION

INK, QUIET, GRID, BAND, PAPER = "#1c2228", "#5c6873", "#dde3e8", "#d6e6f2", "#ffffff"
THEME = {
    INK: "ink", QUIET: "quiet", GRID: "grid", BAND: "band", PAPER: "paper",
    BLUE.lower(): "blue", ORANGE.lower(): "orange", GREEN.lower(): "green", VERMILLION.lower(): "vermillion",
}  # fmt: skip
_AIRY = 20  # patients that may take room; more have to fit a page of paper
_FONTS = "system-ui, sans-serif"
_STYLE = {
    "svg.fonttype": "none", "font.size": 8.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": QUIET,
    "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.facecolor": PAPER,
}  # fmt: skip


def patient_figure(
    means: Mapping[str, float],
    images: Mapping[str, Sequence[float]],
    *,
    centre: float | None,
    interval: tuple[float, float] | None,
    label: str,
    zero: bool = False,
) -> str:
    """Draw a row a patient, sorted: the mean as a large dot, the images as small ones, the interval as a band.

    Args:
        means: by patient, not empty.
        images: values of the images by patient; a patient may lack.
        centre: the mean of the set.
        interval: low and high.
        label: of the axis.
        zero: mark 0, for differences.

    Returns:
        SVG.
    """
    ranked = sorted(means, key=lambda name: (means[name], name))
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # its stubs know fewer names
        row = 0.235 if len(ranked) <= _AIRY else 0.15
        figure = Figure(figsize=(5.6, 0.95 + row * len(ranked)), layout="constrained")
        axes = figure.add_subplot()
        if interval is not None:
            axes.axvspan(*interval, color=BAND, label="95 % interval", linewidth=0)
        if centre is not None:
            axes.axvline(centre, color=BLUE, linewidth=1.2, label="mean of the set")
        if zero:
            axes.axvline(0, color=QUIET, linewidth=1, linestyle="--", label="no difference")
        dots = [(value, row) for row, name in enumerate(ranked) for value in images.get(name, ())]
        if dots:
            values, rows = np.array(dots).T
            spread = np.linspace(-0.18, 0.18, 5)[np.arange(len(rows)) % 5]  # so that equal ones stay visible
            axes.plot(values, rows + spread, "o", color=ORANGE, markersize=3.4, alpha=0.7, mew=0, label="image")
        axes.plot(
            [means[name] for name in ranked], range(len(ranked)), "o",
            color=BLUE, markersize=6.5, markeredgecolor=PAPER, markeredgewidth=0.8, label="patient",
        )  # fmt: skip
        axes.set(yticks=range(len(ranked)), yticklabels=[_plain(name) for name in ranked], xlabel=label)
        axes.set_ylim(-0.7, len(ranked) - 0.3)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper left", ncols=5, fontsize=8, handletextpad=0.4, columnspacing=1.2)
        return _svg(figure, f"patients {label}")


def threshold_figure(curve: Mapping[str, Sequence[float]], chosen: float | None) -> str:
    """Plot Dice, IoU, precision and recall of the validation part against the threshold, the chosen one marked.

    Args:
        curve: `threshold` and the four scores, each T numbers in [0, 1].
        chosen: threshold in use, which need not be one of them; None where there are several.

    Returns:
        SVG.
    """
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(3.7, 3.3), layout="constrained")
        axes = figure.add_subplot()
        for name, (colour, style) in CURVES.items():
            axes.plot(curve["threshold"], curve[name], style, color=colour, label=CURVE_LABELS[name], linewidth=1.7)
        if chosen is not None:
            axes.axvline(chosen, color=INK, linewidth=1, linestyle=":")
            side, away = ("left", 3) if chosen < 0.6 else ("right", -3)
            label = f"chosen {chosen:.2f}"
            axes.annotate(label, (chosen, 0.02), xytext=(away, 0), textcoords="offset points", ha=side, fontsize=8)
        _unit_square(axes, "threshold on the probability", "mean over validation images")
        figure.legend(loc="outside upper left", ncols=4, fontsize=8, handlelength=1.8, columnspacing=0.9)
        return _svg(figure, "threshold")


def reliability_figure(bins: Sequence[Mapping[str, Any]]) -> str:
    """Plot the share of vessel pixels against their predicted probability, above the number of pixels.

    Args:
        bins: `low`, `high`, `n`, and the mean `confidence` and `frequency` of the n pixels; some n is above 0.

    Returns:
        SVG.
    """
    filled = [one for one in bins if one["n"]]
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(3.7, 3.3), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], "--", color=QUIET, linewidth=1, label="perfect")
        above.plot(
            [one["confidence"] for one in filled], [one["frequency"] for one in filled], "o-",
            color=BLUE, markersize=4.5, linewidth=1.5, label="this network",
        )  # fmt: skip
        _unit_square(above, "", "share of true pixels")
        figure.legend(loc="outside upper left", ncols=2, fontsize=8)
        widths = [one["high"] - one["low"] for one in bins]
        below.bar([one["low"] for one in bins], [one["n"] for one in bins], widths, align="edge", color=BLUE, alpha=0.6)
        below.set(yscale="log", xlabel="predicted probability", ylabel="pixels", xlim=(0, 1))
        below.yaxis.set_major_formatter(EngFormatter(sep=""))
        below.minorticks_off()
        return _svg(figure, "reliability")


def themed(svg: str, prefix: str) -> str:
    """Adapt a figure to a page: colours by variables, unique ids, the width of the column."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'(?<= id=")', f"{prefix}-", body)
    body = re.sub(r'(?<=href="#)|(?<=url\(#)', f"{prefix}-", body)
    body = re.sub("|".join(THEME), lambda found: f"var(--{THEME[found[0]]})", body)
    return re.sub(r'^<svg ([^>]*?)width="[^"]*"([^>]*?)height="[^"]*"', r'<svg aria-hidden="true" \1\2', body, count=1)


def _unit_square(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=x, ylabel=y)


def _plain(name: str) -> str:
    """Escape a text for Matplotlib, where a dollar sign would begin a formula."""
    return name.replace("$", r"\$")


def _svg(figure: Figure, salt: str) -> str:
    file = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", metadata=empty)
    # Widths were those of Matplotlib's own font, which is wider than what browsers have.
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", rf"font: \1 {_FONTS}", file.getvalue())
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
