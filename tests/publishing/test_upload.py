"""Upload to a small hub on this machine, and the list of what leaves."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import HfApi
from rich.console import Console

from vessel.errors import VesselError
from vessel.publishing import upload
from vessel.publishing.upload import check_repository, push


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "README.md").write_text("# oct\n")
    (made / "model.safetensors").write_bytes(b"\xff\xfe weights")
    (made / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {"vocab": {"invented": 3}}}))
    (made / "tokenizer.model").write_bytes(b"\xff\xfeinvented")
    return made


def test_a_repository_has_an_owner_and_a_name():
    check_repository("me/sa2va-oct")
    with pytest.raises(VesselError, match="push=me/a/b: no name of a repository"):
        check_repository("me/a/b")


@pytest.fixture
def hub(monkeypatch):
    """Answers as the hub does up to the upload itself; `hub.asked` lists what came, `hub.private` is what it says."""

    class Hub(BaseHTTPRequestHandler):
        asked, private, status = [], True, 200

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            Hub.asked.append((self.path, json.loads(body)))
            self._say({"url": f"http://127.0.0.1:{self.server.server_port}/me/oct", "name": "me/oct", "id": "me/oct"})

        def do_GET(self):
            Hub.asked.append((self.path, None))
            self._say({"id": "me/oct", "private": Hub.private, "siblings": [], "tags": []})

        def _say(self, content):
            self.send_response(Hub.status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(upload, "HfApi", lambda: HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_x"))
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def uploaded(monkeypatch):
    """Stands where the files would go over the network."""
    calls = []
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **call: calls.append(call))
    return calls


def test_push_shows_what_goes_then_makes_a_private_repository(folder, hub, uploaded, capsys):
    push(folder, "me/oct", private=True, console=Console())
    path, body = hub.asked[0]
    assert (path, body["visibility"], body["name"], body["organization"]) == (
        "/api/repos/create", "private", "oct", "me"
    )  # fmt: skip
    assert [call["repo_id"] for call in uploaded] == ["me/oct"]
    assert uploaded[0]["folder_path"] == folder
    told = capsys.readouterr().out
    assert "me/oct (private), 4 files" in told
    for name in ("README.md", "model.safetensors", "tokenizer.json", "tokenizer.model"):
        assert name in told


def test_a_public_repository_is_not_taken_for_a_private_one(folder, hub, uploaded, capsys):
    hub.private = False
    with pytest.raises(VesselError, match="is a public repository"):
        push(folder, "me/oct", private=True, console=Console())
    assert uploaded == []
    push(folder, "me/oct", private=False, console=Console())
    assert "me/oct (PUBLIC)" in capsys.readouterr().out
    assert len(uploaded) == 1


def test_a_hub_that_refuses_or_is_not_there_leaves_the_folder(folder, hub, uploaded, monkeypatch):
    hub.status = 403
    with pytest.raises(VesselError, match=r"refused \(HfHubHTTPError.*The export is whole and stays in"):
        push(folder, "me/oct", private=True, console=Console())
    monkeypatch.setattr(upload, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_x"))
    with pytest.raises(VesselError, match=r"not reached or refused .*`hf upload me/oct"):
        push(folder, "me/oct", private=True, console=Console())
    assert uploaded == []
    assert (folder / "README.md").is_file()
