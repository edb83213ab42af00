import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked as pip would."""
    place = tmp_path_factory.mktemp("wheel")
    build = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(place), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *build], check=True, capture_output=True, timeout=300)
    [wheel] = place.glob("vessel-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return place / "site"


@pytest.mark.slow
def test_the_wheel_holds_all_configs_and_commands(installed):
    shipped = {file.relative_to(installed / "vessel/conf") for file in (installed / "vessel/conf").rglob("*.yaml")}
    assert shipped == {file.relative_to(CONF) for file in CONF.rglob("*.yaml")}
    [entry_points] = installed.glob("*.dist-info/entry_points.txt")
    for verb in ("prepare", "train", "evaluate", "predict", "export"):
        assert f"vessel-{verb} = vessel.{verb}:main" in entry_points.read_text()


@pytest.mark.slow
def test_an_installed_wheel_works_from_any_folder(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    code = "import vessel.cli.conf as c; print(c.CONF)"
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert where.stdout.strip() == str(installed / "vessel/conf")
    command = [sys.executable, "-m", "vessel.train", "experiment=lora_r128", "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "name: lora_r128" in done.stdout
