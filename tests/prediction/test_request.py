"""Mistakes in the options of vessel.predict are told before anything heavy is imported."""

import subprocess
import sys

import pytest

FREE = ("ckpt=nowhere", "images=scans", "out=free")


@pytest.fixture
def here(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "old/masks").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (FREE[:2], "out= is missing"),
        ((*FREE, "+colour=red"), "colour= is no option"),
        ((*FREE[:2], "out=old"), "overwrite=true"),
        ((*FREE[:2], "out=scans/.."), "holds more than results"),
        (("ckpt=nowhere", "images=scan", "out=free"), "images=scan: no such file or folder"),
        ((*FREE, "decode=greedy"), "decode=greedy: must be one of forced, generate"),
        ((*FREE, "question=What?"), "decode=generate"),
    ],
)
def test_a_mistake_is_told_at_once(here, arguments, message):
    command = [sys.executable, "-X", "importtime", "-m", "vessel.predict", *arguments]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60, check=False)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 1
    assert len(errors) == 1
    assert message in errors[0]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"numpy", "torch", "transformers"}
    assert not (here / "free").exists()
