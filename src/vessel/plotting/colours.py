"""Colours of phrases, agreement and curves: those of Okabe and Ito, distinct for every kind of colour vision."""

from __future__ import annotations

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILLION, PURPLE, SKY, YELLOW = "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"
PHRASE_COLOURS = (SKY, GREEN, PURPLE, YELLOW, BLUE, VERMILLION, ORANGE)  # warm ones last: OCT images are sepia
AGREEMENT = {"true positive": GREEN, "false positive": VERMILLION, "false negative": SKY}
CURVES = {"dice": (BLUE, "-"), "iou": (ORANGE, "-"), "precision": (GREEN, "--"), "recall": (VERMILLION, "-.")}
CURVE_LABELS = {"dice": "Dice", "iou": "IoU", "precision": "Precision", "recall": "Recall"}
