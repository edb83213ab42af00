import csv
import json
import os

import pytest
from tests.evaluation.simulated import PHRASES, edit, results, rows_of

from vessel.errors import VesselError
from vessel.evaluation.results import read_results, rows_hash, seal


def falling(image, phrase):
    return 0.9 - 0.01 * int(image[1]) - 0.1 * PHRASES.index(phrase)


@pytest.fixture
def folder(tmp_path):
    return results(tmp_path / "results", rows_of(falling))


@pytest.fixture
def run(tmp_path):
    """Write a run folder with results on its test part."""
    folder = results(tmp_path / "run/evaluate/test", rows_of(falling))
    manifest = json.loads((folder / "metrics.json").read_text())["manifest"]
    (tmp_path / "run/manifest.json").write_text(json.dumps({**manifest, "fingerprint": ""}))
    return tmp_path / "run"


def test_reads_what_was_written(folder):
    read = read_results(folder)
    assert list(read.rows) == rows_of(falling)
    assert read.report == json.loads((folder / "metrics.json").read_text())
    assert read_results(folder / "metrics.json") == read
    assert read.report["rows_hash"] == rows_hash(folder / "per_image.csv")


def test_the_folder_of_a_run_stands_for_its_results(run):
    assert read_results(run).folder == run / "evaluate/test"
    with pytest.raises(VesselError, match=r"run: .*python -m vessel\.evaluate .*split=val"):
        read_results(run, "val")


def test_the_folder_of_a_cross_validation_stands_for_its_pooled_results(tmp_path):
    results(tmp_path / "sweep/evaluate/pooled", rows_of(falling), fold="pooled", source="outputs/tiny/sweep")
    assert read_results(tmp_path / "sweep").report["fold"] == "pooled"
    edit(tmp_path / "sweep/evaluate/pooled", lambda report: report.update(tolerance=3))
    with pytest.raises(VesselError, match=r"python -m vessel.evaluate folds=outputs/tiny/sweep"):
        read_results(tmp_path / "sweep")


def test_folders_without_results_are_refused(tmp_path):
    with pytest.raises(VesselError, match=r"nowhere: .*outputs/<name>/<time>"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(VesselError, match=r"out=FOLDER"):
        read_results(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(VesselError, match=r"metrics\.json.*read"):
        read_results(tmp_path)
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(VesselError, match=r"metrics\.json.*object"):
        read_results(tmp_path)


def test_results_without_seal_are_of_another_vessel(folder):
    edit(folder, lambda report: report.pop("hash"))
    with pytest.raises(VesselError, match=r"lacks hash.*overwrite=true"):
        read_results(folder)


def test_guard_I11_a_changed_figure_is_refused_by_name(folder):
    edit(folder, lambda report: report["summary"]["lumen"]["dice"].update(mean=0.95))
    with pytest.raises(VesselError, match=r"summary\.lumen\.dice\.mean .*0\.95.*per_image\.csv .*0\.875"):
        read_results(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda report: report.update(n_ok=13), "n_ok is 13"),
        (lambda report: report.update(n_failed=1), "n_failed is 1"),
        (lambda report: report.update(n_failed=1, failures=[{"id": "p1_0"}]), "p1_0 is among the failures"),
        (lambda report: report.update(phrases=["lumen"]), "has a row of p1_0, 'side branch'"),
        (lambda report: report.update(phrases=[*PHRASES, "cap"]), "has no row of p1_0, 'cap'"),
        (lambda report: report["summary"].pop("lumen"), "summary.lumen is None"),
        (lambda report: report["data"].update(split_hash="other"), "data.split_hash is other"),
        (lambda report: report["data"].update(fingerprint="other"), "data.fingerprint is other"),
        (lambda report: report["manifest"]["data"].update(split_hash="x"), "its manifest gives x"),
        (lambda report: report.update(fingerprint="other"), "fingerprint is other"),
        (lambda report: report.update(run="better"), "run is better"),
        (lambda report: report.update(threshold=0.4), "hash is not that of its content"),
        (lambda report: report["patients"]["all"]["dice"].update(p1=1.0), "hash is not that of its content"),
    ],
)
def test_guard_I11_whatever_is_changed_is_refused(folder, change, named):
    edit(folder, change)
    with pytest.raises(VesselError, match=r"metrics\.json .*overwrite=true") as refused:
        read_results(folder)
    assert named in str(refused.value)


def test_guard_I11_changed_rows_are_refused(folder):
    file = folder / "per_image.csv"
    file.write_text(file.read_text().replace("0.89", "0.99", 1))
    with pytest.raises(VesselError, match=r"per_image\.csv .*hash"):
        read_results(folder)
    os.remove(file)
    with pytest.raises(VesselError, match=r"per_image\.csv .*gone"):
        read_results(folder)


def test_guard_D9_shuffled_patients_are_refused(folder):
    """Patients exchanged among the rows, and every hash made to fit: the intervals are no longer theirs."""
    file = folder / "per_image.csv"
    lines = list(csv.reader(file.open(newline="")))
    others = {"p1": "p2", "p2": "p1"}
    for cells in lines[1:]:
        if cells[0].endswith("_0"):
            cells[1] = others.get(cells[1], cells[1])
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(lines)

    def forge(report):
        report["rows_hash"] = rows_hash(file)
        report["hash"] = seal(report)

    with pytest.raises(VesselError, match=r"per_image\.csv .*hash"):
        read_results(folder)
    edit(folder, forge)
    with pytest.raises(VesselError, match=r"summary\.\w+\.\w+\.\w+ is"):
        read_results(folder)


def test_guard_D9_a_manifest_of_another_split_is_refused(run):
    file = run / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["data"]["split_hash"] = "another"
    file.write_text(json.dumps(manifest))
    with pytest.raises(VesselError, match=r"data\.split_hash .*s{64}.*manifest\.json .*another"):
        read_results(run)


def test_results_on_other_data_are_none_of_the_manifest(tmp_path):
    manifest = {"name": "tiny", "fingerprint": "tiny-weights", "data": {"fingerprint": "own", "split_hash": "own"}}
    rows = rows_of(falling)
    folder = results(tmp_path / "results", rows, manifest=manifest, data__same_as_run=False)
    assert read_results(folder).report["data"]["same_as_run"] is False


def test_results_of_which_nothing_could_be_scored_can_be_read(tmp_path):
    folder = results(tmp_path / "results", [], failed=("p1_0",))
    assert read_results(folder).rows == ()


def test_results_with_the_old_names_of_a_decision_are_read(tmp_path):
    new = {"threshold": 0.4, "hysteresis": 0.2, "cleanup": {}, "tta": ["flip"]}
    old = {"threshold": 0.4, "low": 0.2, "cleanup": {}, "views": ["flip"]}
    trial = {"option": "views", "value": "flip", "low": -0.1, "high": 0.1}
    use = {"time": "t", "fingerprint": "f"}
    folder = results(
        tmp_path / "old", rows_of(falling), decision=old, searched=[trial], test_uses=[{**use, "decision": old}]
    )
    sealed = (folder / "metrics.json").read_bytes()
    report = read_results(folder).report
    assert report["decision"] == new
    assert report["searched"] == [{**trial, "option": "tta"}]  # `low` of a trial is the end of an interval
    assert report["test_uses"] == [{**use, "decision": new}]
    assert (folder / "metrics.json").read_bytes() == sealed
