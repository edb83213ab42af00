"""comparison.html and comparison.md, of a comparison that `vessel.evaluate compare=` made."""

import json
import shutil

import pytest

from vessel.errors import VesselError
from vessel.reporting.page import write_comparison


@pytest.fixture
def comparison(compared, tmp_path):
    """A copy with other differences: `comparison(change)` gives its folder; `change` gets each of them."""

    def copy(change=lambda entry: None, **changes):
        content = json.loads((compared / "comparison.json").read_text()) | changes
        for entry in content["differences"]:
            change(entry)
        (tmp_path / "comparison.json").write_text(json.dumps(content))
        return tmp_path

    return copy


def difference_table(page):
    return next(table for table in page.tables if "minus" in table["caption"])


def test_guard_I11_every_number_is_one_of_comparison_json(comparison, parsed, numbers):
    folder = comparison()
    assert [file.name for file in write_comparison(folder)][-2:] == ["comparison.md", "comparison.html"]
    content = json.loads((folder / "comparison.json").read_text())
    page = parsed(folder / "comparison.html")
    printed = {float(one["attributes"]["value"]) for one in page.of("data")}
    assert len(printed) > 80
    assert printed <= numbers(content)
    [dice] = [d for d in content["differences"] if (d["phrase"], d["metric"]) == ("lumen", "dice")]
    cell = difference_table(page)["rows"][1][2]
    assert [value for _, value in cell["data"]] == [dice["mean"], dice["low"], dice["high"]]
    assert dice["verdict"] in cell["text"].replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("numbers_", "verdict", "tone"),
    [
        ((0.02, -0.01, 0.05), "inside the noise", "quiet"),
        ((0.02, 0.01, 0.05), "better", "good"),
        ((-0.02, -0.05, -0.01), "worse", "bad"),
        ((0.02, None, None), "not known", "quiet"),
    ],
    ids=["noise", "better", "worse", "unknown"],
)
def test_guard_I9_a_difference_inside_the_noise_is_called_so(comparison, parsed, numbers_, verdict, tone):
    mean, low, high = numbers_
    folder = comparison(lambda d: d.update(mean=mean, low=low, high=high, verdict=verdict))
    write_comparison(folder)
    page = parsed(folder / "comparison.html")
    cells = [cell for row in difference_table(page)["rows"][1:] for cell in row[1:]]
    assert {cell["attributes"]["class"] for cell in cells} == {tone}
    assert all(verdict in cell["text"].replace("\N{NO-BREAK SPACE}", " ") for cell in cells)
    assert f"{verdict}." in page.of("p")[1]["text"]
    assert (folder / "comparison.md").read_text().replace("\N{NO-BREAK SPACE}", " ").count(verdict) > len(cells)


def test_guard_D9_the_split_marks_every_table_of_scores(comparison, parsed):
    write_comparison(folder := comparison(unit="block"))
    tables = [t for t in parsed(folder / "comparison.html").tables if "Mean" in t["caption"] or "minus" in t["caption"]]
    assert len(tables) == 4
    assert all("not by patient" in table["caption"] for table in tables)


def test_pairs_without_the_reference_are_folded(comparison, compared, parsed):
    differences = json.loads((compared / "comparison.json").read_text())["differences"]
    more = [*differences, *({**d, "b": "third"} for d in differences), *({**d, "a": "third"} for d in differences)]
    write_comparison(folder := comparison(differences=more))
    page = parsed(folder / "comparison.html")
    folded = [one["text"].strip().split("\n")[0] for one in page.of("details")]
    assert folded == ["All scores of unet", "All scores of lora_r128", "lora_r128 against third", "The other pairs"]
    assert len(page.of("svg")) == 3


def test_a_name_is_no_markup(comparison, compared, parsed):
    content = json.loads((compared / "comparison.json").read_text())
    content["runs"][0]["run"] = "<script>x"
    write_comparison(folder := comparison(lambda d: d.update(a="<script>x"), runs=content["runs"]))
    assert not parsed(folder / "comparison.html").of("script")
    assert "<script" not in (folder / "comparison.md").read_text()


def test_nothing_in_common(comparison, parsed):
    write_comparison(folder := comparison(differences=[], n_images=0))
    text = "".join(parsed(folder / "comparison.html").text)
    assert "Nothing could be compared." in text
    assert "There are no differences." in text


def test_the_page_of_a_comparison_leaves_that_of_an_evaluation_alone(comparison, simulated):
    folder = comparison()
    shutil.copytree(simulated, folder, dirs_exist_ok=True)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures/report_threshold.svg").write_text("<svg/>")
    write_comparison(folder)
    assert (folder / "figures/report_threshold.svg").is_file()


def test_a_comparison_that_is_not_there(tmp_path):
    with pytest.raises(VesselError, match=r"comparison\.json .*Errno 2"):
        write_comparison(tmp_path)
