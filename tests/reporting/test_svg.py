import re
from xml.etree import ElementTree

import pytest

from vessel.reporting.svg import THEME, patient_figure, reliability_figure, themed, threshold_figure

BINS = [
    {"low": 0.0, "high": 0.5, "n": 900, "confidence": 0.1, "frequency": 0.05},
    {"low": 0.5, "high": 1.0, "n": 0, "confidence": None, "frequency": None},
]
CURVE = {"threshold": [0.2, 0.5], **{name: [0.5, 0.8] for name in ("dice", "iou", "precision", "recall")}}
MEANS = {"p1": 0.7, "p2": 0.9, "p3": 0.8}


def words(svg):
    return ["".join(one.itertext()) for one in ElementTree.fromstring(svg).iter() if one.tag.endswith("}text")]


def patients(**changes):
    options = {"centre": 0.8, "interval": (0.7, 0.9), "label": "Dice"}
    return patient_figure(MEANS, {"p1": [0.6, 0.8], "p2": [0.9]}, **options | changes)


def test_patients_stand_in_the_order_of_their_means():
    texts = words(patients())
    assert [word for word in texts if word in MEANS] == ["p1", "p3", "p2"]  # from below
    assert {"95 % interval", "mean of the set", "image", "patient", "Dice"} <= set(texts)


def test_what_is_not_known_is_not_drawn():
    texts = words(patients(interval=None, centre=None))
    assert not {"95 % interval", "mean of the set"} & set(texts)
    assert "no difference" in words(patients(zero=True))


@pytest.mark.parametrize(("chosen", "expected"), [(0.35, ["chosen 0.35"]), (0.9, ["chosen 0.90"]), (None, [])])
def test_the_threshold_in_use_is_marked_though_it_is_not_in_the_curve(chosen, expected):
    assert [word for word in words(threshold_figure(CURVE, chosen)) if "chosen" in word] == expected


def test_empty_bins_have_no_dot():
    full = [{**one, "n": 900, "confidence": 0.1, "frequency": 0.1} for one in BINS]
    marks = [svg.count("<use") for svg in (reliability_figure(BINS), reliability_figure(full))]
    assert marks[1] == marks[0] + 1


@pytest.mark.parametrize("draw", [patients, lambda: threshold_figure(CURVE, 0.3), lambda: reliability_figure(BINS)])
def test_colours_of_a_page_are_those_of_its_style_sheet(draw):
    inside = themed(draw(), "f")
    assert not re.findall(r"#[0-9a-f]{6}", inside)
    assert set(re.findall(r"var\(--(\w+)\)", inside)) <= set(THEME.values())
    assert inside.startswith("<svg")
    assert "width=" not in inside.split(">")[0].replace("viewBox", "")
    ElementTree.fromstring(inside)


def test_two_figures_of_a_page_share_no_id():
    first, second = themed(patients(), "a"), themed(patients(), "b")
    ids = [set(re.findall(r' id="([^"]+)"', one)) for one in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_text_is_text_and_a_dollar_no_formula():
    svg = patient_figure({"$a_b$": 0.5}, {}, centre=None, interval=None, label="Dice")
    assert "$a_b$" in words(svg)
