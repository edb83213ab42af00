import json
import shutil
from html.parser import HTMLParser

import pytest
from tests.reporting.simulated import write_results

from vessel.evaluation.comparison import compare
from vessel.reporting.page import write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Parsed(HTMLParser):
    """A parsed page: elements with their text, tables, and faults of its structure."""

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.elements, self.tables, self.text = [], [], [], [], []
        self.feed(text)
        self.faults += [f"{tag} is never closed" for tag, _ in self.open]

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "attributes": dict(attributes), "text": "", "data": []}
        self.elements.append(element)
        if tag == "table":
            self.tables.append({"caption": "", "rows": []})
        if tag == "tr":
            self.tables[-1]["rows"].append([])
        if tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append(element)
        if tag not in VOID:
            self.open.append((tag, element))

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "attributes": dict(attributes), "text": "", "data": []})

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1][0] if self.open else 'nothing'}")
            return
        _, element = self.open.pop()
        if tag == "caption":
            self.tables[-1]["caption"] = element["text"]
        if tag == "data":
            for _, outer in self.open:
                outer["data"].append((element["text"], float(element["attributes"]["value"])))

    def handle_data(self, data):
        for _, element in self.open:
            element["text"] += data
        if not any(tag in ("style", "svg", "head") for tag, _ in self.open):
            self.text.append(data)

    def of(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_results(folder)
    return folder


@pytest.fixture(scope="session")
def written(simulated):
    """The folder with its report, to be read only."""
    write_report(simulated)
    return simulated


@pytest.fixture
def results(simulated, tmp_path):
    """A copy of the simulated results, with keys of metrics.json replaced: `results(unit="block")` gives its folder.

    Curves are left out unless they are given: they take most of the time.
    """

    def copy(**changes):
        folder = tmp_path / "results"
        shutil.copytree(simulated, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("report.*", "figures"))
        report = json.loads((folder / "metrics.json").read_text()) | {"curve": None, "reliability": {}} | changes
        (folder / "metrics.json").write_text(json.dumps(report))
        return folder

    return copy


@pytest.fixture
def report(simulated):
    """The content of metrics.json, to be changed."""
    return json.loads((simulated / "metrics.json").read_text())


@pytest.fixture
def parsed():
    def read(file):
        page = Parsed(file.read_text(encoding="utf-8"))
        assert page.faults == []
        return page

    return read


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """The folder of a comparison of two runs of two patients."""
    folder = tmp_path_factory.mktemp("compared")
    for run, network, skill in (("unet", "unet", 0.85), ("lora_r128", "sa2va", 0.95)):
        write_results(folder / run, run=run, network=network, skill=skill, patients=3, phrases=("lumen", "side branch"))
    compare([folder / "unet", folder / "lora_r128"], folder)
    return folder


def numbers_of(value):
    """All numbers among plain values."""
    if isinstance(value, dict | list):
        return {
            number for part in (value.values() if isinstance(value, dict) else value) for number in numbers_of(part)
        }
    return {float(value)} if isinstance(value, int | float) else set()


@pytest.fixture
def numbers():
    return numbers_of
