import csv
import json

import numpy as np
import pytest
from scipy import stats

from vessel.errors import VesselError
from vessel.metrics.summary import ImageScore, summarise, write_per_image_csv


def score(image: str, dice: float, *, patient="pa", video="v1", phrase="lumen", present=True) -> ImageScore:
    return ImageScore(image, patient, video, phrase, present, dice, dice / 2, 0.7, 0.8, 0.35)


def test_means_count_an_image_once_and_each_phrase_apart():
    rows = [score("i1", 0.2), score("i1", 0.4, phrase="cap"), score("i2", 0.9, patient="pb")]
    summary = summarise(rows)
    assert summary["all"]["dice"]["mean"] == pytest.approx((0.3 + 0.9) / 2)
    assert summary["lumen"]["dice"]["mean"] == pytest.approx((0.2 + 0.9) / 2)
    assert summary["cap"]["iou"]["mean"] == pytest.approx(0.2)
    assert (summary["all"]["dice"]["n_images"], summary["all"]["dice"]["n_patients"]) == (2, 2)
    json.dumps(summary, allow_nan=False)


def test_a_phrase_that_is_seldom_there_is_also_scored_where_it_is():
    rows = [score("i1", 1.0, present=False), score("i2", 1.0, present=False), score("i3", 0.4)]
    rows += [score(image, 1.0, phrase="cap", present=False) for image in ("i1", "i2", "i3")]
    summary = summarise(rows)
    lumen = summary["lumen"]["dice"]
    assert (lumen["mean"], lumen["mean_present"], lumen["n_present"]) == (pytest.approx(0.8), 0.4, 1)
    assert (summary["cap"]["dice"]["mean"], summary["cap"]["iou"]["mean_present"]) == (1.0, None)
    assert {name: scores["recall"]["n_present"] for name, scores in summary.items()} == {"all": 1, "lumen": 1, "cap": 0}
    assert summary["all"]["iou"]["mean_present"] == 0.2
    assert "mean_present" not in summary["lumen"]["precision"]


def test_interval_with_one_image_a_patient_is_the_ordinary_bootstrap():
    values = np.random.default_rng(3).uniform(0.5, 1, 40)
    rows = [score(f"i{i}", v, patient=f"p{i}") for i, v in enumerate(values)]
    ours = summarise(rows, draws=5000)["all"]["dice"]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert ours["unit"] == "patient"
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_interval_equals_a_naive_cluster_bootstrap():
    rng = np.random.default_rng(0)
    of_patient = {f"p{k}": rng.uniform(0.2, 1, size=k + 1) for k in range(5)}
    rows = [score(f"{p}-{i}", v, patient=p) for p, values in of_patient.items() for i, v in enumerate(values)]
    clusters, drawn = list(of_patient.values()), np.random.default_rng(7)
    means = [np.concatenate([clusters[i] for i in drawn.integers(5, size=5)]).mean() for _ in range(300)]
    ours = summarise(rows, draws=300, seed=7)["all"]["dice"]
    assert (ours["low"], ours["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert summarise(rows, seed=7) == summarise(rows, seed=7) != summarise(rows, seed=8)


def test_frames_that_resemble_each_other_do_not_narrow_the_interval():
    alike = [score(f"{p}-{i}", 0.5 + 0.1 * p, patient=f"p{p}") for p in range(4) for i in range(30)]
    alone = [score(f"{p}", 0.5 + 0.1 * p, patient=f"p{p}") for p in range(4)]
    for bound in ("low", "high"):
        assert summarise(alike)["all"]["dice"][bound] == pytest.approx(summarise(alone)["all"]["dice"][bound])


def test_the_unit_falls_back_to_videos_then_images_and_says_so():
    rows = [score("i1", 0.2), score("i2", 0.4), score("i3", 0.9, video="v2")]
    assert summarise(rows)["all"]["dice"]["unit"] == "video"
    images = summarise(rows[:2])["all"]["dice"]
    assert (images["unit"], images["low"], images["high"]) == ("image", 0.2, 0.4)
    single = summarise(rows[:1])["all"]["dice"]
    assert (single["low"], single["high"], single["n_images"]) == (None, None, 1)


def test_nothing_scored_and_a_phrase_named_all_are_refused():
    with pytest.raises(VesselError, match="no image was scored"):
        summarise([])
    with pytest.raises(VesselError, match='"all"'):
        summarise([score("i", 0.5, phrase="all")])


def test_csv_holds_every_row(tmp_path):
    rows = [score("i1", 0.25), score("i2, left", 0.5, phrase="épicarde")]
    write_per_image_csv(tmp_path / "per_image.csv", rows)
    with (tmp_path / "per_image.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [r["id"] for r in read] == ["i1", "i2, left"]
    assert [float(r["dice"]) for r in read] == [0.25, 0.5]
    assert read[1]["phrase"] == "épicarde"
    assert [r["present"] for r in read] == ["True", "True"]
    scores = ["dice", "iou", "precision", "recall"]
    assert list(read[0]) == ["id", "patient", "video", "phrase", "present", *scores, "threshold"]
