"""The whole set in figures and in one picture."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vessel.data.catalog import Frame, Split
from vessel.data.masks import write_mask
from vessel.data.overview import _spread, _thumbnail, absence_warnings, contact_sheet, statistics, tables
from vessel.data.splits import make_split
from vessel.plotting.colours import PHRASE_COLOURS


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


def test_a_part_without_a_phrase_is_warned_of(tmp_path):
    made = frames(tmp_path, 1, 1, 1)
    parts = {"train": (made[0].id,), "val": (made[1].id,), "test": (made[2].id,)}
    split = Split(unit="patient", seed=0, gap=0, note="", parts=parts, folds=())
    made[2] = replace(made[2], masks={"cap": None, "lumen": None})
    warnings = absence_warnings(made, split)
    assert [sentence.partition(" images:")[0] for sentence in warnings] == [
        "cap is in none of the 1 train",
        "cap is in none of the 1 val",
        "cap is in none of the 1 test",
        "lumen is in none of the 1 test",
    ]


def test_thumbnail_colours_the_masks_and_leaves_the_rest(tmp_path):
    [made] = frames(tmp_path, 1)  # 64 x 48, shown at 240 x 180; lumen: the upper left 8 x 24 pixels
    pixels = _thumbnail(tmp_path, made)
    green = list(bytes.fromhex(PHRASE_COLOURS[1][1:]))
    assert pixels.shape == (180, 240, 3)
    assert pixels[150, 150].tolist() == [10, 10, 10]
    assert pixels[40, 29].tolist() == green  # the edge
    assert pixels[40, 10].tolist() == [round(10 + 0.35 * (c - 10)) for c in green]


def test_a_vessel_of_one_pixel_survives_a_thumbnail(tmp_path):
    Image.new("RGB", (960, 960)).save(tmp_path / "a.png")
    mask = np.zeros((960, 960), dtype=bool)
    mask[:, 481] = True
    write_mask(tmp_path / "a_mask.png", mask)
    pixels = _thumbnail(tmp_path, Frame("a", "a.png", 960, 960, "p", "p_v1", 0, {"lumen": "a_mask.png"}, "a"))
    assert pixels[:, 120].any(axis=1).all()


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
