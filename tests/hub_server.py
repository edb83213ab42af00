"""A model hub on this machine: just enough of its protocol for `huggingface_hub` to list and download a repository."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories; gives the address and the list of paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body: bool):
            path = self.path.split("?")[0]
            asked.append(path)
            for name, folder in repositories.items():
                if path.startswith(f"/api/models/{name}/tree/"):
                    return self.send(200, json.dumps(self.tree(folder)).encode(), body)
                if path.startswith(f"/api/models/{name}"):
                    facts = {"id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": []}
                    return self.send(200, json.dumps(facts).encode(), body)
                for revision in ("main", COMMIT):
                    prefix = f"/{name}/resolve/{revision}/"
                    if path.startswith(prefix) and (file := folder / path.removeprefix(prefix)).is_file():
                        return self.send(200, file.read_bytes(), body)
            return self.send(404, b"{}", body, error="RepoNotFound")

        def tree(self, folder: Path) -> list[dict]:
            return [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in sorted(folder.iterdir())
            ]

        def send(self, status: int, content: bytes, body: bool, error: str | None = None):
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Accept-Ranges", "bytes")
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
