"""report.html and report.md, of results that the real metrics made."""

import csv
import re

import pytest

from vessel.errors import VesselError
from vessel.privacy.scanner import Scanner
from vessel.reporting.evaluation_figures import image_values
from vessel.reporting.page import write_report

SECTIONS = [
    "Scores", "Patients", "Threshold and calibration", "Images", "Failures", "From probability to mask",
    "Data and split", "Weights and run", "CLAIM checklist",
]  # fmt: skip


def test_guard_I11_the_table_of_scores_says_what_metrics_json_says(written, report, parsed):
    table = parsed(written / "report.html").tables[0]
    head, *rows = table["rows"]
    columns = ["all", "lumen", "side branch", "lipid core"]
    assert [cell["text"].split("30 images")[0] for cell in head[1:]] == ["all phrases", *columns[1:]]
    named = {re.split("\N{NO-BREAK SPACE}|where", row[0]["text"])[0].strip(): row for row in reversed(rows)}
    assert list(named) == [metric["title"] for metric in reversed(report["metrics"].values())]
    for metric, about in report["metrics"].items():
        decimals = 2 if about["unit"] else 3
        for phrase, cell in zip(columns, named[about["title"]][1:], strict=True):
            entry = report["summary"][phrase][metric]
            stated = [entry[key] for key in ("mean", "low", "high")]
            assert [value for _, value in cell["data"]] == stated, (metric, phrase)
            assert [float(text.replace("−", "-")) for text, _ in cell["data"]] == [round(v, decimals) for v in stated]
    present = [row for row in rows if row[0]["text"] == "Dice where present"]
    assert [cell["data"][0][1] for cell in present[0][1:]] == [
        report["summary"][p]["dice"]["mean_present"] for p in columns
    ]


def test_guard_I11_every_number_of_the_page_is_one_of_metrics_json(written, results, report, parsed, numbers):
    page = parsed(written / "report.html")
    printed = {float(one["attributes"]["value"]) for one in page.of("data")}
    assert len(printed) > 150
    assert printed <= numbers(report)
    report["summary"]["lumen"]["dice"]["mean"] = 0.12345
    write_report(folder := results(**report))
    assert ("0.123", 0.12345) in parsed(folder / "report.html").tables[0]["rows"][1][2]["data"]


def test_the_counts_stand_beside_the_numbers(results, report, parsed):
    report["summary"]["lumen"]["ece"] |= {"n_images": 28, "unit": "video"}
    write_report(folder := results(**report))
    head, *rows = parsed(folder / "report.html").tables[0]["rows"]
    assert head[2]["text"] == "lumen30 images, 10 videos, 7 patients, present in 30"
    assert rows[-1][2]["text"].endswith(", over videos, n = 28")


def test_sections_come_in_order_and_markdown_says_the_same(written, parsed):
    page, markdown = parsed(written / "report.html"), (written / "report.md").read_text()
    assert [heading["text"] for heading in page.of("h2")][1:] == SECTIONS
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == SECTIONS
    position = 0
    for one in page.of("data"):  # each number again, in the same order
        position = markdown.index(one["text"], position)
    for target in re.findall(r"\]\(<?([^)>]+)>?\)", markdown):
        assert (written / target).is_file()


def test_the_page_is_one_file_that_asks_for_nothing(written, parsed):
    page = parsed(written / "report.html")
    assert not {"script", "link", "iframe", "object"} & {one["tag"] for one in page.elements}
    for one in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert one["attributes"].get(name, "#").startswith(("#", "data:")), one["attributes"]
    style = page.of("style")[0]["text"]
    assert "url(" not in style
    assert "@import" not in style
    assert all(image["attributes"]["alt"] for image in page.of("img"))
    assert len(page.of("img")) == 4
    drawn = [one for one in page.of("div") if one["attributes"].get("role") == "img"]
    assert len(drawn) == 4 + 4 + 1
    assert all(one["attributes"]["aria-label"] for one in drawn)


def test_ids_are_unique_and_references_lead_somewhere(written, parsed):
    page = parsed(written / "report.html")
    ids = [one["attributes"]["id"] for one in page.elements if "id" in one["attributes"]]
    assert len(ids) == len(set(ids)) > 100
    links = [value for one in page.elements for name, value in one["attributes"].items() if name.endswith("href")]
    clips = re.findall(r"url\(#([^)]+)\)", (written / "report.html").read_text())
    assert {link[1:] for link in links} | set(clips) <= set(ids)


def test_the_same_results_give_the_same_bytes(results):
    folder = results()
    first, second = ({file.name: file.read_bytes() for file in write_report(folder)} for _ in range(2))
    assert first == second


def test_figures_of_an_earlier_report_go(results, report):
    write_report(folder := results(curve=report["curve"]))
    assert (folder / "figures/report_threshold.svg").is_file()
    write_report(results())
    assert not (folder / "figures/report_threshold.svg").exists()


@pytest.mark.parametrize("unit", ["block", "frame"])
def test_guard_D9_a_split_that_is_not_by_patient_marks_every_table_with_scores(results, parsed, unit):
    write_report(folder := results(unit=unit))
    page = parsed(folder / "report.html")
    scores = [table for table in page.tables if table["caption"].startswith(("Mean", "Choices"))]
    assert len(scores) == 4
    assert all("not by patient" in table["caption"] for table in scores)
    assert all("not by patient" in one["text"] for one in page.of("figcaption") if "Dice of" in one["text"])
    assert "not by patient" in page.of("aside")[0]["text"]
    assert (folder / "report.md").read_text().count("not by patient") >= 4 + 1
    write_report(results(unit="patient"))
    assert "not by patient" not in "".join(parsed(folder / "report.html").text)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"note": "No threshold was chosen on validation."}, "No threshold was chosen on validation."),
        ({"n_failed": 3}, "3 images failed and are in no score"),
        ({"seg_missing": 0.25}, "did not emit [SEG] for 25.0 %"),
        ({"test_uses": [{"time": "t", "fingerprint": "f", "decision": {}}] * 3}, "was used 3 times"),
    ],
    ids=["note", "failures", "seg", "uses"],
)
def test_warnings_stand_before_the_numbers(results, parsed, changes, warning):
    write_report(folder := results(**changes))
    assert warning in parsed(folder / "report.html").of("aside")[0]["text"]
    assert warning.replace("[", r"\[").replace("]", r"\]") in (folder / "report.md").read_text().split("## Scores")[0]


def test_the_unit_of_intervals_is_said_when_it_is_not_the_patient(results, report, parsed):
    report["summary"]["all"]["dice"] |= {"unit": "block", "n_patients": 1}
    write_report(folder := results(**report))
    assert "intervals are over blocks" in parsed(folder / "report.html").of("aside")[0]["text"]


def test_names_are_words_and_never_markup(results, report, parsed):
    evil = '<script>alert("x")</script> | $\\alpha$ & `[a](b)`'
    renamed = {"all": "all", "lumen": evil, "side branch": "side branch", "lipid core": "lipid core"}
    for key in ("summary", "patients", "reliability"):
        report[key] = {renamed[phrase]: content for phrase, content in report[key].items()}
    report["patients"]["all"]["dice"] |= {"$p_1$ <b>": 0.5}
    report["failures"][0]["reason"] = "<img src=x>\n| second"
    write_report(folder := results(**report | {"run": evil, "phrases": list(renamed)[1:]}))
    text, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    page = parsed(folder / "report.html")
    assert evil in page.of("h1")[0]["text"]
    assert not page.of("script")
    assert "<img src=x" not in text + markdown
    assert "<script" not in markdown
    assert "$p_1$ <b>" in "".join(one["text"] for one in page.of("text"))
    head = next(line for line in markdown.splitlines() if line.startswith("|  | all phrases"))
    assert len(re.findall(r"(?<!\\)\|", head)) == 6


def test_guard_D11_nothing_private_is_said(results):
    files = write_report(folder := results())
    texts = [(file.name, file.read_text()) for file in files]
    assert Scanner().require_clean(texts, doing="the report") == len(files)
    assert not [name for name, text in texts if str(folder) in text]


def test_a_table_that_was_changed_is_not_drawn(results):
    folder = results()
    with (folder / "per_image.csv").open("a") as file:
        file.write("one more\n")
    with pytest.raises(VesselError, match=r"per_image\.csv .*metrics\.json"):
        write_report(folder)


def test_results_that_are_not_there(tmp_path):
    with pytest.raises(VesselError, match=r"metrics\.json .*Errno 2"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(VesselError, match=r"metrics\.json .*object"):
        write_report(tmp_path)


def test_a_dot_is_an_image(simulated):
    """By phrase as the rows have it, for all phrases the mean over those of the image."""
    found = image_values(simulated / "per_image.csv", None)
    rows = list(csv.DictReader((simulated / "per_image.csv").open()))
    of_patient = [row for row in rows if row["patient"] == rows[0]["patient"]]
    assert found["lumen"][rows[0]["patient"]] == [float(row["dice"]) for row in of_patient if row["phrase"] == "lumen"]
    first = [float(row["dice"]) for row in of_patient[:3]]
    assert found["all"][rows[0]["patient"]][0] == pytest.approx(sum(first) / 3)
    assert sum(len(values) for values in found["all"].values()) == len({row["id"] for row in rows})


def nothing_scored(report):
    return {"summary": {}, "patients": {}, "reliability": {}, "curve": None, "panels": [], "n_ok": 0, "phrases": []}


def one_image(report):
    """Of one block of one video of one patient there is no interval."""
    summary = report["summary"]
    for entries in summary.values():
        for entry in entries.values():
            entry |= {"low": None, "high": None, "unit": "block", "n_images": 1, "n_patients": 1, "n_videos": 1}
    patients = {p: {m: dict(list(v.items())[:1]) for m, v in of.items()} for p, of in report["patients"].items()}
    return {"summary": summary, "patients": patients, "panels": [], "n_ok": 1}


def undefined_scores(report):
    for entries in report["summary"].values():
        entries["ece"] |= dict.fromkeys(("mean", "low", "high", "mean_images")) | {"n_images": 0, "n_present": 0}
    return {"reliability": {name: [one | {"n": 0} for one in bins] for name, bins in report["reliability"].items()}}


def many_phrases(report):
    names = ["all", *(f"phrase number {i}" for i in range(12))]
    changes = {key: dict.fromkeys(names, report[key]["lumen"]) for key in ("summary", "patients", "reliability")}
    return changes | {"phrases": names[1:]}


def many_patients(report):
    patients = {f"p{i:08x}": 0.5 + i / 100 for i in range(40)}
    return {"patients": {"all": {"dice": patients}, "lumen": {"dice": patients}, "other": {}}}


def pooled_folds(report):
    folds = [{"fold": i, "threshold": 0.3 + i / 10, "fingerprint": "f", "stopped_early": False} for i in range(3)]
    return {"fold": "pooled", "split": "val", "threshold": None, "folds": folds, "panels": []}


def little_known(report):
    empty = dict.fromkeys(("curve", "pixel_spacing", "tolerance", "seg_missing", "searched", "manifest", "created"))
    return empty | {"panels": None, "test_uses": [], "failures": [], "n_failed": 0, "decision": None, "rows_hash": None}


@pytest.mark.parametrize(
    "odd",
    [nothing_scored, one_image, undefined_scores, many_phrases, many_patients, pooled_folds, little_known],
    ids=lambda odd: odd.__name__,
)
def test_odd_results_give_whole_pages(results, report, parsed, odd):
    write_report(folder := results(**report | odd(report)))
    page = parsed(folder / "report.html")
    assert [heading["text"] for heading in page.of("h2") if heading["text"] in SECTIONS] == SECTIONS
    words = "".join(page.text) + (folder / "report.md").read_text()
    assert not re.search(r"\bNone\b(?!:)|\bnan\b|\{\}", words)
    for table in page.tables:
        assert len({len(row) for row in table["rows"]}) == 1
        assert len(table["rows"][0]) <= 11


def test_what_was_not_scored_is_said(results, report, parsed):
    write_report(folder := results(**report | nothing_scored(report)))
    assert "No image of the test part could be scored; 1 failed." in "".join(parsed(folder / "report.html").text)
    write_report(results(**report | undefined_scores(report)))
    assert parsed(folder / "report.html").tables[0]["rows"][-1][1]["text"] == "not defined"


def test_a_single_phrase_is_not_told_twice(results, report, parsed):
    changes = {key: {p: report[key][p] for p in ("all", "lumen")} for key in ("summary", "patients", "reliability")}
    write_report(folder := results(**changes))
    head, *_ = parsed(folder / "report.html").tables[0]["rows"]
    assert [cell["text"][:5] for cell in head] == ["", "lumen"]


def test_folds_are_told(results, report, parsed):
    write_report(folder := results(**report | pooled_folds(report)))
    page = parsed(folder / "report.html")
    assert "On all folds of synthetic_oct" in page.of("p")[1]["text"]
    table = next(table for table in page.tables if "folds" in table["caption"])
    assert [row[1]["text"] for row in table["rows"]] == ["threshold", "0.3", "0.4", "0.5"]
