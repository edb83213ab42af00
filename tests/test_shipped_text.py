"""No file of the project names a folder of one machine, or where its packages came from."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRIVATE = re.compile(
    "|".join([r"(?<![\w.$}>/])/(?:home|root|work|Users|opt|mnt|tmp)/\w", "pythonhost" + "ed", "artifact" + "ory"])
    + r"|(?:extra-|--)index"
    + r"-url|find-links"
)


def test_shipped_text_names_no_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    found = []
    for name in filter(None, files):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() and path != Path(__file__) else b""
        text = "" if b"\0" in data else data.decode("utf-8")
        found += [f"{name}:{n}: {line}" for n, line in enumerate(text.splitlines(), 1) if PRIVATE.search(line)]
    assert found == []


@pytest.mark.parametrize("line", ["data: /" + "home/someone/oct", "cp /" + "tmp/x .", "--extra-" + "index-url file"])
def test_such_a_line_is_seen(line):
    assert PRIVATE.search(line)
    assert not PRIVATE.search("outputs/tmp/x, https://example.org/home/page, <root>/work/x")
