"""Hub ids: downloaded once, pinned to their commit."""

import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from tests.hub_server import COMMIT, serve
from tests.weights.layouts import write_sa2va

from vessel.errors import VesselError
from vessel.weights.entry import Weights
from vessel.weights.recognition import open_source


@pytest.fixture
def hub(plan, tmp_path, monkeypatch):
    """Serve a hub with one repository, `somebody/Sa2VA-tiny`, and a cache of its own; yield the requested paths."""
    folder = write_sa2va(tmp_path / "repository", plan().build(), shards=2)
    with serve({"somebody/Sa2VA-tiny": folder}) as (address, requests):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield requests


def test_a_hub_id_is_downloaded_and_pinned(hub, plan):
    pinned = Weights("hf://somebody/Sa2VA-tiny").pinned()
    assert (pinned.source, pinned.revision) == ("hf://somebody/Sa2VA-tiny", COMMIT)
    made = plan(weights=[pinned])
    made.build()
    assert made.reports[0].revision == COMMIT
    assert COMMIT[:12] in made.reports[0].table().title


def test_a_revision_may_stand_in_the_name(hub):
    source = open_source(f"hf://somebody/Sa2VA-tiny@{COMMIT}")
    assert source.path.name == COMMIT
    assert source.kind.name == "Sa2VA folder"
    assert any(COMMIT in path for path in hub)


def test_the_hub_is_used_only_where_it_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "somebody" / "Sa2VA-tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert Weights("somebody/Sa2VA-tiny").fetch() == (Path("somebody/Sa2VA-tiny"), None)
    assert hub == []
    assert Weights("hf://somebody/Sa2VA-tiny", revision=COMMIT).fetch()[1] == COMMIT


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_guard_D22_a_missing_path_is_sent_nowhere(hub, revision):
    with pytest.raises(VesselError, match="hf://patients/smith_john"):
        Weights("patients/smith_john", revision=revision).fetch()
    for missing in ("outputs/x", "x.pt", "a/b/c.pth", "../a/b"):
        with pytest.raises(VesselError, match=re.escape(missing)):
            open_source(missing)
    assert hub == []


def test_a_file_of_a_repository_is_downloaded_alone(hub, plan):
    index = "model.safetensors.index.json"
    path, commit = Weights(f"hf://somebody/Sa2VA-tiny/{index}@main").fetch()
    assert (path.name, commit) == (index, COMMIT)
    assert [file.name for file in path.parent.iterdir()] == [index]


def test_a_missing_repository_is_refused(hub):
    with pytest.raises(VesselError, match="hf://somebody/else"):
        open_source("hf://somebody/else")


def test_a_hub_that_cannot_be_reached_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(VesselError, match="hf://somebody/unreachable"):
        open_source("hf://somebody/unreachable")
