import matplotlib
import numpy as np
import pytest
from PIL import Image
from skimage.segmentation import find_boundaries

from vessel.plotting.colours import AGREEMENT
from vessel.plotting.overlays import overlay
from vessel.plotting.panels import panel_figure, sweep_figure


def saved(figure, path) -> np.ndarray:
    figure.savefig(path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_overlay_is_opaque_on_the_edge_and_translucent_inside():
    image = np.full((9, 9, 3), 100, np.uint8)
    mask = np.zeros((1, 9, 9), bool)
    mask[0, 2:7, 2:7] = True
    out = overlay(image, mask, colours=("#ff0000",), alpha=0.25)
    assert out[2, 4].tolist() == [255, 0, 0]
    assert out[4, 4].tolist() == [139, 75, 75]  # 100 + 0.25 * (255 - 100), 100 - 0.25 * 100
    assert out[0, 0].tolist() == [100, 100, 100]
    assert image.max() == 100


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (40, 50)])
def test_overlay_draws_the_inner_edge_of_scikit_image(size):
    mask = np.random.default_rng(0).random(size) > 0.3
    out = overlay(np.zeros((*size, 3), np.uint8), mask[None], colours=("#ffffff",), alpha=0.2)
    expected = np.where(find_boundaries(mask, mode="inner"), 255, 51 * mask)
    assert np.array_equal(out, np.repeat(expected[..., None], 3, axis=2))


def test_overlay_of_empty_and_full_masks():
    image = np.zeros((4, 5, 3), np.uint8)
    assert not overlay(image, np.zeros((2, 4, 5), bool)).any()
    assert overlay(image, np.ones((1, 4, 5), bool)).any(axis=2).all()


def test_sweep_figure_marks_the_best_threshold(tmp_path):
    thresholds = [0.2, 0.5, 0.8]
    curve = {"threshold": thresholds, "dice": [0.5, 0.8, 0.6], "iou": [0.4, 0.7, 0.5]}
    curve |= {"precision": [0.6, 0.7, 0.9], "recall": [0.9, 0.8, 0.4]}
    figure = sweep_figure(curve, 0.5)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Best threshold 0.50, Dice 0.800"
    assert [line.get_label() for line in axes.lines[:4]] == ["Dice", "IoU", "Precision", "Recall"]
    assert axes.lines[0].get_ydata().tolist() == [0.5, 0.8, 0.6]
    assert saved(figure, tmp_path / "sweep.png").min() < 100


def test_panel_figure_shows_errors_in_their_colours(tmp_path):
    masks, probability = np.zeros((2, 30, 40), bool), np.zeros((2, 30, 40), np.float32)
    masks[0, 5:25, 5:20] = True  # missed on the left, hit in the middle, invented on the right
    probability[0, 5:25, 12:30] = 0.9
    image = np.full((30, 40, 3), 60, np.uint8)
    figure = panel_figure(image, masks, probability, threshold=0.5, labels=["lumen", "cap"], title="frame a")
    errors = figure.axes[3].images[0].get_array()
    corner = {"true positive": (5, 14), "false positive": (5, 25), "false negative": (5, 8)}
    for name, colour in AGREEMENT.items():
        assert tuple(errors[corner[name]]) == tuple(bytes.fromhex(colour[1:])), name
    assert figure.axes[0].get_ylabel() == "lumen"
    assert saved(figure, tmp_path / "panel.png").shape[1] > 1000


def test_figures_leave_pyplot_alone():
    backend = matplotlib.get_backend()
    sweep_figure({name: [0.5] for name in ("threshold", "dice", "iou", "precision", "recall")}, 0.5)
    assert matplotlib.get_backend() == backend
