import re
import subprocess
import sys

import pytest


def run_demo(folder, *options):
    return subprocess.run(
        [sys.executable, "-m", "vessel.demo", *options], cwd=folder, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_the_demo_goes_through_all_commands_and_ends_with_its_line(tmp_path):
    done = run_demo(tmp_path, "trainer.max_steps=2", "trainer.val_check_interval=2")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"demo: test_dice=[01]\.\d{3} seconds=\d+", done.stdout.splitlines()[-1])
    verbs = re.findall(r"^\$ python -m vessel\.(\w+)", done.stdout, flags=re.MULTILINE)
    assert verbs == ["prepare", "train", "evaluate", "export", "predict"]
    [home] = (tmp_path / "outputs/demo").iterdir()
    assert list((home / "predictions/overlays").rglob("*.png"))


@pytest.mark.slow
def test_a_failing_command_stops_the_demo_with_its_message(tmp_path):
    done = run_demo(tmp_path, "loss=nine")
    assert done.returncode == 1
    assert "loss=nine: choose one of" in done.stderr
    assert done.stderr.splitlines()[-1] == "demo: vessel.train ended with status 1"
    assert "vessel.evaluate" not in done.stdout
