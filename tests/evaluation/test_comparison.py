import csv
import json

import pytest
from tests.evaluation.simulated import PHRASES, results, row, rows_of

from vessel.errors import VesselError
from vessel.evaluation.comparison import compare
from vessel.metrics.intervals import cluster_interval
from vessel.metrics.scores import METRICS

NAMES = {"p1": ["p1_0"], "p2": ["p2_0", "p2_1"], "p3": ["p3_0", "p3_1", "p3_2"]}
GAINS = {"p1_0": 0.1, "p2_0": 0.0, "p2_1": 0.06, "p3_0": 0.05, "p3_1": 0.02, "p3_2": 0.05}
MEANS = {"p1": 0.1, "p2": 0.03, "p3": 0.04}  # by hand


@pytest.fixture
def make_results(tmp_path):
    """Return a function that writes the results folder of a run: every image scores 0.7 and a gain."""

    def make(run, gain=lambda image, phrase: 0.0, **changes):
        rows = changes.pop("rows", None) or rows_of(lambda image, phrase: 0.7 + gain(image, phrase))
        return results(tmp_path / f"{run}_{len(list(tmp_path.iterdir()))}", rows, run=run, **changes)

    return make


@pytest.fixture
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


def of(report, phrase, metric):
    [found] = [one for one in report["differences"] if (one["phrase"], one["metric"]) == (phrase, metric)]
    return found


def rows_of_gain(sign):
    names = [name for group in NAMES.values() for name in group]
    return [row(name, phrase, 0.5 + sign * GAINS[name]) for name in names for phrase in PHRASES]


def test_difference_by_hand(make_results, out):
    report = compare([make_results("a", rows=rows_of_gain(0)), make_results("b", rows=rows_of_gain(1))], out)
    dice = of(report, "lumen", "dice")
    assert dice["per_patient"] == pytest.approx(MEANS)
    assert dice["mean"] == pytest.approx((0.1 + 0.03 + 0.04) / 3)
    assert (dice["low"], dice["high"]) == pytest.approx(cluster_interval([0.1, 0.03, 0.04]))
    assert (dice["unit"], dice["n_clusters"], dice["n_patients"], dice["n_images"]) == ("patient", 3, 3, 6)
    assert of(report, "all", "hd95")["mean"] == pytest.approx(-40 * dice["mean"])
    assert json.loads((out / "comparison.json").read_text()) == report
    assert (report["n_images"], report["n_patients"]) == (6, 3)


def test_every_phrase_and_every_defined_metric_has_its_difference(make_results, out):
    report = compare([make_results("a"), make_results("b", lambda *_: 0.1)], out)
    expected = {(phrase, metric) for phrase in ("all", *PHRASES) for metric in METRICS if metric != "ece"}
    assert {(one["phrase"], one["metric"]) for one in report["differences"]} == expected
    lines = list(csv.DictReader((out / "comparison.csv").open(newline="")))
    assert len(lines) == len(expected)
    assert float(lines[0]["mean"]) == report["differences"][0]["mean"]


def test_a_score_that_one_run_does_not_have_is_left_out_of_both(make_results, out):
    def rows(value):
        return [row(f"p{p}_0", phrase, 0.7, ece=value if p == 1 else 0.1) for p in (1, 2, 3) for phrase in PHRASES]

    report = compare([make_results("a", rows=rows(None)), make_results("b", rows=rows(0.3))], out)
    assert of(report, "lumen", "ece")["per_patient"] == {"p2": 0.0, "p3": 0.0}


def test_guard_I9_a_difference_inside_the_noise_is_called_so(make_results, out, capsys):
    noisy = {"p1": 0.1, "p2": -0.08, "p3": 0.05, "p4": -0.03}
    noise = make_results("noise", lambda image, phrase: noisy[image[:2]])
    report = compare([make_results("base"), noise], out)
    assert of(report, "all", "dice")["verdict"] == of(report, "all", "hd95")["verdict"] == "inside the noise"
    assert of(report, "all", "dice")["mean"] > 0
    assert capsys.readouterr().out.count("inside the noise") == 3 * 3
    better = make_results("better", lambda image, phrase: 0.1 + 0.001 * int(image[1]))
    report = compare([make_results("base"), better], out)
    assert of(report, "all", "dice")["verdict"] == of(report, "all", "hd95")["verdict"] == "better"
    report = compare([better, make_results("base")], out)
    assert of(report, "all", "dice")["verdict"] == of(report, "all", "hd95")["verdict"] == "worse"
    assert of(report, "all", "component_error")["verdict"] == "inside the noise"  # equal in both


def test_pairs(make_results, out):
    runs = [make_results(f"run{i}", lambda *_, i=i: 0.01 * i) for i in range(5)]
    pairs = {(one["a"], one["b"]) for one in compare(runs[:4], out)["differences"]}
    assert len(pairs) == 6
    pairs = {(one["a"], one["b"]) for one in compare(runs, out)["differences"]}
    assert pairs == {("run0", f"run{i}") for i in range(1, 5)}


def test_runs_of_one_name_get_names_of_their_own(make_results, out):
    report = compare(
        [make_results("tiny", fingerprint="1" * 64), make_results("tiny", fingerprint="2" * 64), make_results("unet")],
        out,
    )
    assert [run["run"] for run in report["runs"]] == ["tiny 11111111", "tiny 22222222", "unet"]
    assert [run["fingerprint"][0] for run in report["runs"]] == ["1", "2", "u"]
    decisions = [make_results("tiny", decision={"threshold": threshold}) for threshold in (0.3, 0.4)]
    report = compare(decisions, out)
    assert [run["run"] for run in report["runs"]] == ["tiny tiny-wei #1", "tiny tiny-wei #2"]


def test_guard_I7_only_images_that_all_runs_scored_count(make_results, out, capsys):
    rows = [one for one in rows_of(lambda image, phrase: 0.8) if one.id != "p1_0"]
    report = compare([make_results("a"), make_results("b", rows=rows, failed=("p1_0",))], out)
    assert report["n_images"] == 11
    assert of(report, "all", "dice")["mean"] == pytest.approx(0.1)
    assert report["runs"][0]["summary"]["all"]["dice"]["n_images"] == 11
    assert [run["n_failed"] for run in report["runs"]] == [0, 1]
    assert report["runs"][1]["failures"][0]["id"] == "p1_0"
    assert "0 of a, 1 of b" in report["note"]
    assert "0 of a, 1 of b" in capsys.readouterr().out


def test_of_one_patient_videos_or_blocks_are_drawn_and_it_says_so(make_results, out):
    one, other = (
        [row(f"p1_{i}", phrase, 0.5 + gain * i / 10) for i in range(9) for phrase in PHRASES] for gain in (0, 0.1)
    )
    report = compare([make_results("a", rows=one), make_results("b", rows=other)], out)
    assert (of(report, "all", "dice")["unit"], of(report, "all", "dice")["n_clusters"]) == ("block", 3)
    assert "over its blocks and say nothing about other patients" in report["note"]


def test_notes_of_runs_are_kept(make_results, out):
    split = "Split by single frames."
    assert compare([make_results("a", note=split), make_results("b", note=split)], out)["note"].count(split) == 1
    report = compare([make_results("a", note=split), make_results("b", note=f"{split} Untuned.")], out)
    assert "a: Split by single frames. b: Split by single frames. Untuned." in report["note"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__fingerprint": "e" * 64}, ["data fingerprint", "d" * 64, "e" * 64]),
        ({"data__split_hash": "t" * 64}, ["split hash", "s" * 64, "t" * 64]),
        ({"split": "val"}, ["part", "test and val"]),
        ({"fold": 2}, ["fold", "None and 2"]),
        ({"length_unit": "mm"}, ["unit of lengths", "px and mm"]),
        ({"pixel_spacing": [0.1, 0.1]}, ["pixel spacing", "None and [0.1, 0.1]"]),
        ({"tolerance": 3.0}, ["surface tolerance", "2.0 and 3.0"]),
        ({"unit": "frame"}, ["unit of the split", "patient and frame"]),
        ({"metrics__dice": {"title": "F1"}}, ["metrics", "{'title': 'F1'}"]),
    ],
)  # fmt: skip
def test_guard_D9_what_was_not_measured_alike_is_not_compared(make_results, out, changes, named):
    with pytest.raises(VesselError, match=r"^one and two ") as refused:
        compare([make_results("one"), make_results("two", **changes)], out)
    assert all(word in str(refused.value) for word in named)
    assert not list(out.iterdir())


def test_other_phrases_are_not_compared(make_results, out):
    lumen = [one for one in rows_of(lambda image, phrase: 0.7) if one.phrase == "lumen"]
    with pytest.raises(VesselError, match=r"phrases: \['lumen', 'side branch'\] and \['lumen'\]"):
        compare([make_results("one"), make_results("two", rows=lumen, phrases=["lumen"])], out)


def test_results_on_other_data_are_not_compared(make_results, out):
    elsewhere = {"name": "two", "fingerprint": "two-weights", "data": {"fingerprint": "own", "split_hash": "own"}}
    with pytest.raises(VesselError, match=rf"^two .*\bown\b.*{'d' * 64}.*other_data=true"):
        compare([make_results("one"), make_results("two", manifest=elsewhere, data__same_as_run=False)], out)


def test_an_untuned_network_is_compared(make_results, out):
    public = {"name": "sa2va", "fingerprint": "sa2va-weights", "data": {}}
    report = compare([make_results("one"), make_results("sa2va", manifest=public, data__same_as_run=False)], out)
    assert [run["run"] for run in report["runs"]] == ["one", "sa2va"]


def test_images_and_patients_must_be_the_same(make_results, out):
    fewer = [one for one in rows_of(lambda image, phrase: 0.7) if one.id != "p2_1"]
    with pytest.raises(VesselError, match=r"\bone\b.* p2_1 \(12 and 11 images\)"):
        compare([make_results("one"), make_results("two", rows=fewer)], out)
    moved = [row(one.id, one.phrase, 0.7) for one in rows_of(lambda image, phrase: 0.7)]
    moved = [
        one if one.id != "p2_1" else type(one)(one.id, "p1", "p1_v1", one.phrase, True, one.scores) for one in moved
    ]
    with pytest.raises(VesselError, match=r"patient .*p2_1, .*'lumen'.* p2 and p1"):
        compare([make_results("one"), make_results("two", rows=moved)], out)


def test_one_run_is_nothing_to_compare(make_results, out):
    one = make_results("one")
    with pytest.raises(VesselError, match=r"^compare="):
        compare([one], out)
    with pytest.raises(VesselError, match=r"\(one-weights\)"):
        compare([one, one], out)
    names = {one.id for one in rows_of(lambda image, phrase: 0.7)}
    nothing = [
        make_results(run, rows=[row(name, phrase, 0.7) for name in keep for phrase in PHRASES], failed=names - keep)
        for run, keep in (("a", {"p1_0"}), ("b", {"p2_0"}))
    ]
    with pytest.raises(VesselError, match=r"all of a, b"):
        compare(nothing, out)


def test_a_tampered_run_is_not_compared(make_results, out):
    one, two = make_results("one"), make_results("two")
    file = two / "per_image.csv"
    file.write_text(file.read_text().replace("0.7", "0.8"))
    with pytest.raises(VesselError, match=r"two_1/per_image\.csv .*hash"):
        compare([one, two], out)


def test_the_tables_fit_100_columns(make_results, out, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    long = make_results(
        "sam2_prompt_with_a_long_name", lambda image, phrase: 0.01 * int(image[1]), network="sam2_prompt"
    )
    compare([make_results("internvl3_8b_lora_r128"), long], out)
    printed = capsys.readouterr().out
    tables = printed[: printed.index("note:")]
    assert max(map(len, tables.splitlines())) <= 100
    assert "…" not in tables
    for word in ("sam2_prompt", "HD95 (px)", "Dice", "better", "+0.025", "4 patients"):
        assert word in tables
