"""Polygons scaled to the size of their image."""

import pytest

from vessel.data.readers.polygons import Polygon, fit_polygons
from vessel.errors import VesselError


def test_guard_D1_a_stated_canvas_is_rescaled():
    polygon = Polygon("f", (0, 0, 800, 0, 800, 400), canvas=(800, 800))
    assert fit_polygons([polygon], (512, 512)) == [[0, 0, 512, 0, 512, 256]]


def test_guard_D1_outside_the_image_is_refused_by_name():
    polygon = Polygon("annotations.json, entry 7 (x.jpg), mask 0, polygon 2", (10, 10, 700, 10, 700, 700))
    with pytest.raises(VesselError, match=r"entry 7 \(x\.jpg\), mask 0, polygon 2: .*10\.\.700"):
        fit_polygons([polygon], (512, 512))


@pytest.mark.parametrize("point", [(-9, 5), (5, -9), (70, 5), (5, 70)])
def test_guard_D1_every_side_of_the_image_counts(point):
    with pytest.raises(VesselError, match=r"f: .*64x64"):
        fit_polygons([Polygon("f", (5, 5, 9, 9, *point))], (64, 64))


def test_a_polygon_may_touch_the_border():
    assert fit_polygons([Polygon("f", (-0.5, 0, 64, 0, 64, 64.5))], (64, 64)) == [[-0.5, 0, 64, 0, 64, 64.5]]


def test_guard_D1_a_canvas_of_another_shape_is_refused():
    with pytest.raises(VesselError, match=r"f: .*800x600"):
        fit_polygons([Polygon("f", (0, 0, 9, 0, 9, 9), canvas=(600, 800))], (512, 512))
