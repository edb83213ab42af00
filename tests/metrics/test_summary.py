import csv
import json
import math
from collections import defaultdict
from dataclasses import fields, replace

import numpy as np
import pytest

from vessel.errors import VesselError
from vessel.metrics.intervals import cluster_interval
from vessel.metrics.scores import METRICS, Scores
from vessel.metrics.summary import (
    ImageScore,
    cluster_means,
    per_patient,
    read_per_image_csv,
    summarise,
    write_per_image_csv,
)

NONE = Scores(**{field.name: None for field in fields(Scores)})


def score(image: str, dice: float | None, *, patient="pa", video="v1", phrase="lumen", present=True, **others):
    return ImageScore(image, patient, video, phrase, present, replace(NONE, dice=dice, **others))


# Patient pa: video v1 with 0.2 and 0.4, video v2 with 0.9; patient pb: video v3 with 0.8, 0.8 and 0.2.
NESTED = [
    score("i1", 0.2), score("i2", 0.4), score("i3", 0.9, video="v2"),
    *(score(f"j{i}", dice, patient="pb", video="v3") for i, dice in enumerate((0.8, 0.8, 0.2))),
]  # fmt: skip


def test_the_mean_climbs_from_images_over_videos_to_patients():
    dice = summarise(NESTED)["all"]["dice"]
    assert dice["mean"] == pytest.approx(((0.3 + 0.9) / 2 + 0.6) / 2)
    assert dice["mean_images"] == pytest.approx(3.3 / 6)
    counts = {name: dice[name] for name in ("n_images", "n_videos", "n_patients", "n_present", "n_clusters")}
    assert counts == {"n_images": 6, "n_videos": 3, "n_patients": 2, "n_present": 6, "n_clusters": 2}


def test_a_video_of_many_frames_has_no_greater_say():
    long = [score(f"k{i}", 0.8, patient="pb", video="v3") for i in range(50)]
    few = [*NESTED[:3], score("k", 0.8, patient="pb", video="v3")]
    assert summarise([*NESTED[:3], *long])["all"]["dice"]["mean"] == summarise(few)["all"]["dice"]["mean"]
    assert per_patient(NESTED, "dice")["lumen"] == pytest.approx({"pa": 0.6, "pb": 0.6})


def test_the_mean_equals_naive_loops():
    rng, rows = np.random.default_rng(0), []
    sums: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for i in range(60):
        patient = f"p{rng.integers(4)}"
        video = f"{patient}v{rng.integers(3)}"
        for phrase in ("lumen", "cap")[: rng.integers(1, 3)]:
            value = None if rng.random() < 0.2 else float(rng.random())
            rows.append(score(f"i{i}", 0.5, patient=patient, video=video, phrase=phrase, hd95=value))
            if value is not None:
                sums[patient][video][i].append(value)
    patients = []
    for videos in sums.values():
        means = []
        for images in videos.values():
            of_images = [sum(values) / len(values) for values in images.values()]
            means.append(sum(of_images) / len(of_images))
        patients.append(sum(means) / len(means))
    hd95 = summarise(rows)["all"]["hd95"]
    assert hd95["mean"] == pytest.approx(sum(patients) / len(patients))
    assert hd95["n_images"] == sum(len(images) for videos in sums.values() for images in videos.values()) < 60
    expected = cluster_interval(patients, bounds=(0, math.inf))
    assert (hd95["low"], hd95["high"]) == pytest.approx(expected)


def test_an_image_counts_once_and_each_phrase_apart():
    rows = [score("i1", 0.2), score("i1", 0.4, phrase="cap"), score("i2", 0.9, patient="pb", video="v2")]
    summary = summarise(rows)
    assert summary["all"]["dice"]["mean"] == pytest.approx((0.3 + 0.9) / 2)
    assert summary["lumen"]["dice"]["mean"] == pytest.approx((0.2 + 0.9) / 2)
    assert summary["cap"]["dice"]["mean"] == 0.4
    assert list(summary) == ["all", "lumen", "cap"]
    assert all(list(scores) == list(METRICS) for scores in summary.values())
    assert per_patient(rows, "dice") == {
        "all": {"pa": pytest.approx(0.3), "pb": 0.9}, "lumen": {"pa": 0.2, "pb": 0.9}, "cap": {"pa": 0.4}
    }  # fmt: skip


def test_an_undefined_score_leaves_its_row_out_and_the_counts_tell():
    rows = [score("i1", 0.5, hd95=3.0), score("i2", 0.7, hd95=None), score("i3", 0.9, patient="pb", video="v2")]
    scores = summarise(rows)["all"]
    assert (scores["hd95"]["mean"], scores["hd95"]["n_images"], scores["hd95"]["n_patients"]) == (3.0, 1, 1)
    assert (scores["hd95"]["low"], scores["hd95"]["unit"], scores["hd95"]["n_clusters"]) == (None, "block", 1)
    assert (scores["dice"]["n_images"], scores["dice"]["unit"]) == (3, "patient")
    nothing = scores["ece"]
    assert (nothing["mean"], nothing["mean_images"], nothing["low"], nothing["high"]) == (None, None, None, None)
    assert (nothing["n_images"], nothing["n_videos"], nothing["n_patients"], nothing["n_present"]) == (0, 0, 0, 0)
    assert per_patient(rows, "ece") == {"all": {}, "lumen": {}}
    json.dumps(summarise(rows), allow_nan=False)


def test_a_phrase_that_is_seldom_there_is_also_scored_where_it_is():
    rows = [
        score("i1", 1.0, iou=1.0, present=False),
        score("i2", 1.0, iou=1.0, present=False),
        score("i3", 0.4, iou=0.2),
    ]
    rows += [score(image, 1.0, iou=1.0, phrase="cap", present=False) for image in ("i1", "i2", "i3")]
    summary = summarise(rows)
    lumen = summary["lumen"]["dice"]
    assert (lumen["mean"], lumen["mean_present"], lumen["n_present"]) == (pytest.approx(0.8), 0.4, 1)
    assert (summary["cap"]["dice"]["mean"], summary["cap"]["iou"]["mean_present"]) == (1.0, None)
    assert {name: scores["dice"]["n_present"] for name, scores in summary.items()} == {"all": 1, "lumen": 1, "cap": 0}
    assert summary["all"]["iou"]["mean_present"] == 0.2
    assert "mean_present" not in summary["lumen"]["precision"]


def test_where_present_is_a_mean_over_patients_as_well():
    rows = [*NESTED, score("far", 1.0, patient="pc", video="v9", present=False)]
    assert summarise(rows)["all"]["dice"]["mean_present"] == summarise(NESTED)["all"]["dice"]["mean"]


def test_guard_I9_frames_that_resemble_each_other_do_not_narrow_the_interval():
    where = [{"patient": f"p{p}", "video": f"v{p}"} for p in range(4)]
    alike = [score(f"{p}-{i}", 0.5 + 0.1 * p, **where[p]) for p in range(4) for i in range(30)]
    alone = [score(f"{p}", 0.5 + 0.1 * p, **where[p]) for p in range(4)]
    for name in ("mean", "low", "high", "n_clusters"):
        assert summarise(alike)["all"]["dice"][name] == pytest.approx(summarise(alone)["all"]["dice"][name])


def test_the_interval_is_that_of_the_means_of_patients():
    rows = [*NESTED, *(score(f"k{i}", 0.1 * i, patient=f"q{i}", video=f"w{i}") for i in range(5))]
    dice = summarise(rows, level=0.8, draws=500, seed=3)["all"]["dice"]
    values = [0.6, 0.6, 0.0, 0.1, 0.2, 0.3, 0.4]
    assert (dice["low"], dice["high"]) == pytest.approx(
        cluster_interval(values, level=0.8, draws=500, seed=3, bounds=(0, 1))
    )
    assert summarise(rows) == summarise(rows[::-1])
    assert summarise(rows, seed=1) != summarise(rows, seed=2)


def test_intervals_stay_in_the_range_of_their_score():
    rows = [
        score(f"i{p}", dice, patient=f"p{p}", video=f"v{p}", hd95=hd95, component_error=0.0)
        for p, (dice, hd95) in enumerate([(1.0, 0.0), (1.0, 0.5), (0.1, 40.0)])
    ]
    scores = summarise(rows)["all"]
    assert (scores["dice"]["low"], scores["dice"]["high"]) == (0, 1)
    assert scores["hd95"]["low"] == 0
    assert scores["hd95"]["high"] > 40
    assert (scores["component_error"]["low"], scores["component_error"]["high"]) == (0, 0)


def test_of_one_patient_videos_are_drawn():
    rows = NESTED[:3]
    assert cluster_means(rows, "dice") == ("video", pytest.approx({"v1": 0.3, "v2": 0.9}))
    dice = summarise(rows)["all"]["dice"]
    assert (dice["unit"], dice["n_clusters"], dice["mean"]) == ("video", 2, pytest.approx(0.6))
    assert (dice["low"], dice["high"]) == (0, 1)


def test_of_one_video_blocks_of_consecutive_frames_are_drawn():
    values = [0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9]
    rows = [score(f"v1_{i:06d}", value) for i, value in enumerate(values)]
    unit, blocks = cluster_means([rows[i] for i in (4, 0, 8, 2, 6, 1, 3, 7, 5)], "dice")
    assert unit == "block"
    assert list(blocks.values()) == pytest.approx([0.1, 0.5, 0.9])
    assert [len(cluster_means([score(f"{i:03d}", 0.5) for i in range(n)], "dice")[1]) for n in (1, 2, 3, 9, 40)] == [
        1, 1, 2, 3, 6
    ]  # fmt: skip
    single = summarise(rows[:1])["all"]["dice"]
    assert (single["low"], single["high"], single["n_images"]) == (None, None, 1)


def test_single_frames_of_one_video_would_promise_too_much():
    drift = np.sin(np.linspace(0, 3, 36)) / 4 + 0.5
    dice = summarise([score(f"{i:03d}", float(value)) for i, value in enumerate(drift)])["all"]["dice"]
    low, high = cluster_interval(drift)
    assert dice["high"] - dice["low"] > 1.5 * (high - low)


def test_equal_names_of_videos_of_two_patients_stay_apart():
    rows = [score("i1", 0.2), score("i2", 0.4, patient="pb")]
    dice = summarise(rows)["all"]["dice"]
    assert (dice["n_videos"], dice["n_patients"]) == (2, 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "^no image"),
        ([score("i", 0.5, phrase="all")], '"all"'),
        ([score("i", 0.5), score("i", 0.6)], "image i .*'lumen'"),
        ([score("i", 0.5), score("i", 0.6, phrase="cap", patient="pb")], "image i .*pa v1 .*pb v1"),
    ],
)
def test_rows_that_would_give_wrong_means_are_refused(rows, message):
    with pytest.raises(VesselError, match=message):
        summarise(rows)


def test_csv_and_back_is_the_same_to_the_last_bit(tmp_path):
    file, odd = tmp_path / "per_image.csv", {m: 0.1 * i + 1 / 3 for i, m in enumerate(METRICS)}
    rows = [
        ImageScore("i2, left", "Zoë", 'v "2"\nb', "épicarde", True, Scores(**odd)),
        ImageScore("i1", "pa", "v1", "lumen", False, NONE),
        score("i3", 1e-17, hd95=724.0773439350246, component_error=3),
        score("i4", np.float64(0.1), hd95=np.float32(0.1)),
    ]
    write_per_image_csv(file, rows)
    assert read_per_image_csv(file) == rows
    assert summarise(read_per_image_csv(file)) == summarise(rows)
    with file.open(newline="", encoding="utf-8") as opened:
        read = list(csv.DictReader(opened))
    assert list(read[0]) == ["id", "patient", "video", "phrase", "present", *METRICS]
    assert [r["present"] for r in read] == ["True", "False", "True", "True"]
    assert (read[1]["dice"], read[2]["hd95"], read[2]["component_error"]) == ("", "724.0773439350246", "3.0")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("id,patient", "id,who", "header"),
        ("0.25", "0.2.5", "line 2, dice: '0.2.5'"),
        ("0.25", "nan", "line 2, dice: 'nan'"),
        ("True", "yes", "line 2: .*'yes'"),
        (",0.25", "", "line 2: 14 .*15"),
        ("i2,", "i1,", "image i1 .*'lumen'"),
        ("i2,", '"i2,', r"vessel\.evaluate"),
    ],
)
def test_a_damaged_csv_is_refused_with_its_line(tmp_path, old, new, words):
    file = tmp_path / "per_image.csv"
    write_per_image_csv(file, [score("i1", 0.25), score("i2", 0.5)])
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(VesselError, match=f"per_image.csv.*{words}"):
        read_per_image_csv(file)


def test_a_csv_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(VesselError, match=r"nothing\.csv .*vessel\.evaluate"):
        read_per_image_csv(tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VesselError, match=r"binary\.csv .*vessel\.evaluate"):
        read_per_image_csv(tmp_path / "binary.csv")
