"""Panels of image, ground truth and prediction, and the figure of a threshold sweep.

They use Matplotlib without pyplot, so no global state is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vessel.plotting.colours import AGREEMENT, BLUE, CURVE_LABELS, CURVES
from vessel.plotting.overlays import overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
PANEL_INCHES = 2.5


def sweep_figure(curve: Mapping[str, Sequence[float]], best: float) -> Figure:
    """Plot Dice, IoU, precision and recall against the threshold.

    Args:
        curve: `threshold`, `dice`, `iou`, `precision`, `recall`, each T numbers in [0, 1].
        best: the chosen one of the thresholds, marked.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for name, (colour, style) in CURVES.items():
        axes.plot(curve["threshold"], curve[name], style, color=colour, label=CURVE_LABELS[name], linewidth=1.8)
    best_dice = curve["dice"][list(curve["threshold"]).index(best)]
    axes.axvline(best, color="0.45", linewidth=0.9, linestyle=":")
    axes.plot([best], [best_dice], "o", color=BLUE, markersize=6, markeredgecolor="white")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="Probability threshold", ylabel="Mean over validation images")
    axes.set_title(f"Best threshold {best:.2f}, Dice {best_dice:.3f}", fontsize=11, loc="left")
    axes.grid(color="0.92", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def panel_figure(
    image: np.ndarray,
    ground_truth: np.ndarray,
    probability: np.ndarray,
    *,
    threshold: float,
    labels: Sequence[str],
    title: str,
    predicted: np.ndarray | None = None,
) -> Figure:
    """Draw a row for each phrase: image, ground truth, probability, and where prediction and ground truth differ.

    Args:
        image: uint8 [H, W, 3].
        ground_truth: bool [K, H, W].
        probability: float [K, H, W] in [0, 1].
        threshold: marked beside the probabilities.
        labels: K short texts, such as a phrase and its Dice.
        title: of the figure.
        predicted: bool [K, H, W]; without it, where the probability is greater than the threshold.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = PANEL_INCHES * image.shape[0] / image.shape[1]
    figure = Figure(
        figsize=(4 * PANEL_INCHES + 0.9, len(labels) * (height + 0.08) + 0.85), dpi=DPI, layout="constrained"
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    grid = figure.subplots(len(labels), 4, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    captions = ("Image", "Ground truth", "Probability", "Prediction against ground truth")
    for axes, caption in zip(grid[0], captions, strict=True):
        axes.set_title(caption, fontsize=10)
    drawn = probability > threshold if predicted is None else predicted
    for row, label, true, probable, mask in zip(grid, labels, ground_truth, probability, drawn, strict=True):
        row[0].set_ylabel(label, fontsize=10)
        row[0].imshow(image)
        row[1].imshow(true, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        _show_probability(row[2], probable, threshold)
        row[3].imshow(_agreement(image, true, mask))
    handles = [Patch(color=colour, label=name) for name, colour in AGREEMENT.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    return figure


def _agreement(image: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Overlay errors strongly and agreement faintly on the image in grey, which has no colour of its own."""
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    hit, extra, missed = AGREEMENT.values()
    faint = overlay(grey, (true & predicted)[None], colours=(hit,), alpha=0.4)
    return overlay(faint, np.stack([predicted & ~true, true & ~predicted]), colours=(extra, missed), alpha=0.8)


def _show_probability(axes: Axes, probability: np.ndarray, threshold: float) -> None:
    image = axes.imshow(probability, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.02, 0.0, 0.04, 1.0)), ticks=[0, 0.5, 1])
    bar.ax.axhline(threshold, color="white", linewidth=1.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
