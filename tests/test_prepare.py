"""The command as a user runs it."""

import numpy as np
import pytest
from PIL import Image
from tests.launching import command

from vessel.data.catalog import Catalog
from vessel.data.masks import write_mask


def run(cwd, *arguments):
    return command("vessel.prepare", *arguments, cwd=cwd)


@pytest.fixture
def scans(tmp_path):
    """Three patients in a folder with a space, four frames each."""
    rng = np.random.default_rng(0)
    (tmp_path / "my scans/images").mkdir(parents=True)
    (tmp_path / "my scans/masks").mkdir()
    for patient in (1, 2, 3):
        for n in range(4):
            stem = f"{patient:03d}_1_{n:03d}"
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                tmp_path / f"my scans/images/{stem}.png"
            )
            write_mask(tmp_path / f"my scans/masks/{stem}_mask.png", rng.random((16, 16)) < 0.5)
    return tmp_path


def test_a_folder_becomes_a_data_set(scans):
    done = run(scans, "source=my scans", "out=data/set", "phrase=lumen", "pixel_spacing=[0.01,0.02]", "workers=0")
    assert done.returncode == 0, done.stderr
    catalog = Catalog.open(scans / "data/set")
    assert catalog.phrases == ("lumen",)
    assert catalog.pixel_spacing == (0.01, 0.02)
    assert "12 images of 3 patient(s)" in done.stdout
    assert (scans / "data/set/contact_sheet.png").is_file()
    assert {p.name for p in (scans / "outputs").iterdir()} == {"prepare"}


def test_help_explains_every_option(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    listed = done.stdout.split("Defaults:")[1].split("Examples:")[0]
    options = [line.split(":")[0] for line in listed.splitlines() if line and not line.startswith(" ")]
    assert len(options) == 15
    explained = done.stdout.split("Defaults:")[0]
    assert [option for option in options if f"\n{option}" not in explained] == []
    assert "Usage: python -m vessel.prepare" in explained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=my scans"], "out= is missing"),
        (["source=gone", "out=set"], "no such folder"),
        (["source=my scans", "out=set", "folds=many"], "folds"),
        (["source=my scans", "out=set", "workers=many"], "workers=many"),
        (["source=my scans", "out=set", "splitt=block"], "splitt"),
        (["source=my scans", "out=set", "synthetic.kindd=oct"], "kindd"),
        (["source=my scans", "out=set", r"identity='(?P<patient>\d)'"], "tells no patient"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(scans, arguments, message):
    done = run(scans, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (scans / "set").exists()
