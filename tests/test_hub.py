"""Names on the hub, and the promise that nothing else is looked up there."""

import re

import pytest
from huggingface_hub import constants
from omegaconf import OmegaConf
from tests.conftest import _configuration
from tests.hub_server import COMMIT, serve

from vessel.data.preparation import PrepareOptions, prepare
from vessel.data.prompt import Prompt
from vessel.errors import VesselError
from vessel.hub import HubName, hub_hint, is_hub_name
from vessel.inference.loading import load_model
from vessel.inference.options import LoadSettings
from vessel.weights.entry import Weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Paths that a hub on this machine was asked for; it holds the model `somebody/small`."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/config.json").write_text("{}", encoding="utf-8")
    with serve({"somebody/small": tmp_path / "repository"}) as (address, requests):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield requests


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://owner/name", HubName("owner/name")),
        ("hf://owner/name@v1.0", HubName("owner/name", revision="v1.0")),
        ("hf://owner/name/deep/a.pt", HubName("owner/name", "deep/a.pt")),
        ("hf://owner/name/a.pt@refs/pr/1", HubName("owner/name", "a.pt", "refs/pr/1")),
    ],
)
def test_a_name_is_read_and_written(text, expected):
    assert HubName.parse(text) == expected
    assert str(expected) == text
    assert is_hub_name(text)


@pytest.mark.parametrize("text", ["hf://owner", "hf://", "hf://a/b c", "hf://a/b@", "owner/name", "hf:///a/b"])
def test_other_forms_are_refused(text):
    with pytest.raises(VesselError, match=re.escape(text)):
        HubName.parse(text)


def test_the_hint_is_given_only_where_the_form_fits():
    assert "hf://owner/name" in hub_hint("owner/name")
    for path in ("../owner/name", "/data/x", "name", "~/x/y", "x.pt"):
        assert hub_hint(path) == ""


def test_a_repository_that_is_named_is_fetched(hub):
    path, commit = HubName.parse("hf://somebody/small").download()
    assert (path.name, commit) == (COMMIT, COMMIT)
    assert hub


def _source(path):
    config = _configuration("prepare", [f"source={path}", "out=data"])
    prepare(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PrepareOptions), config)))


MISTYPED = ("patients/smith_john", "outputs/x", "outputs/tiny/2026-01-01", "a/b")
OPTIONS = {
    "ckpt": load_model,  # of evaluate, predict and export
    "network.base": lambda path: load_model(path, LoadSettings(base=[Weights(path)])),
    "weights": lambda path: Weights(path).pinned(),
    "weights with a revision": lambda path: Weights(path, revision=COMMIT).pinned(),
    "prompt.tokenizer": lambda path: Prompt(path, "qwen_chat").token_ids,
    "source": _source,
}


@pytest.mark.parametrize("path", MISTYPED)
@pytest.mark.parametrize("option", OPTIONS)
def test_guard_D22_a_mistyped_path_is_sent_nowhere(hub, tmp_path, monkeypatch, option, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VesselError, match=path):
        OPTIONS[option](path)
    assert hub == []
