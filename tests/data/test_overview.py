"""The whole set in figures and in one picture."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vessel.data.catalog import Frame
from vessel.data.masks import write_mask
from vessel.data.overview import COLOURS, _spread, contact_sheet, overlay, statistics, tables
from vessel.data.splits import make_split


def frames(root, *counts):
    made = []
    for patient, count in enumerate(counts):
        for n in range(count):
            name = f"p{patient}_v1_{n:06d}"
            Image.new("RGB", (64, 48), (10, 10, 10)).save(root / f"{name}.png")
            mask = np.zeros((48, 64), dtype=bool)
            mask[:24, : 8 * (n + 1)] = True
            write_mask(root / f"{name}_mask.png", mask)
            masks = {"cap": None, "lumen": f"{name}_mask.png"}
            made.append(Frame(name, f"{name}.png", 64, 48, f"p{patient}", f"p{patient}_v1", n, masks, name))
    return made


def test_guard_D13_figures_of_every_frame(tmp_path):
    made = frames(tmp_path, 2, 1, 1)
    shares = {f.id: {"lumen": 0.1 * (k + 1)} for k, f in enumerate(made[:3])} | {made[3].id: {}}
    figures = statistics(made, shares)
    lumen = figures["phrases"]["lumen"]
    assert (lumen["present"], lumen["absent"]) == (3, 1)
    assert lumen["share_of_all"] == pytest.approx(0.15)
    assert lumen["share_where_present"] == pytest.approx({"mean": 0.2, "min": 0.1, "max": 0.3})
    assert figures["phrases"]["cap"]["share_where_present"] == {"mean": None, "min": None, "max": None}
    assert figures["patients"] == {"p0": {"p0_v1": 2}, "p1": {"p1_v1": 1}, "p2": {"p2_v1": 1}}

    console = Console(width=120, record=True)
    for table in tables(figures, make_split(made)):
        console.print(table)
    text = console.export_text()
    assert "4 images of 3 patient(s), 3 video(s) of 1-2 frames; 64x48 (4)" in text
    assert "15.00%" in text


def test_overlay_colours_the_mask_and_leaves_the_rest(tmp_path):
    made = frames(tmp_path, 1)
    pixels = np.array(overlay(tmp_path, made[0], {"cap": COLOURS[0], "lumen": COLOURS[1]}))
    assert pixels[40, 40].tolist() == [10, 10, 10]
    assert pixels[10, 3].tolist() == [int(0.75 * 10 + 0.25 * c) for c in COLOURS[1]]
    assert pixels[10, 8].tolist() == list(COLOURS[1])


def test_sheet_has_a_cell_for_each_frame_up_to_its_limit(tmp_path):
    made = frames(tmp_path, 8, 2, 1)
    assert contact_sheet(tmp_path, made, count=6).size == (6 * 248, 34 + 266)
    assert contact_sheet(tmp_path, made).size == (6 * 248, 34 + 2 * 266)


def test_sheet_shows_every_patient_before_it_repeats_one(tmp_path):
    made = frames(tmp_path, 8, 2, 1)
    assert [f.id for f in _spread(made, 6)] == [
        "p0_v1_000000",
        "p0_v1_000004",
        "p0_v1_000007",
        "p1_v1_000000",
        "p1_v1_000001",
        "p2_v1_000000",
    ]
