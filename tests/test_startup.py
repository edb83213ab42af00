"""What a command imports before its first result: every library costs seconds of each start."""

import subprocess
import sys

import pytest
from tests.conftest import TINY_NETWORK

pytestmark = pytest.mark.slow

# Each has its use, but not on the way to a first step without adapters, dashboards and images that are shown.
UNUSED = {
    "IPython", "av", "deepspeed", "gradio", "monai", "pandas", "peft", "pycocotools", "pytest", "skimage", "sklearn",
    "tensorboard", "wandb",
}  # fmt: skip
# What training stands on, and its augmentation; torchmetrics brings matplotlib and scipy.signal.
OF_TRAINING = {"albumentations", "lightning", "matplotlib", "torchmetrics"}


def modules_after(verb, *overrides):
    """Names of all modules that a command has imported when it is done."""
    code = f"import sys; from vessel.{verb} import main; main(); print('imported:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *overrides], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("startup") / "run"


@pytest.fixture(scope="module")
def of_first_step(run, oct_set):
    return modules_after(
        "train", "experiment=tiny", f"data.root={oct_set}", f"hydra.run.dir={run}", "trainer.max_steps=1", *TINY_NETWORK
    )


def test_a_first_step_imports_only_what_it_uses(of_first_step):
    assert of_first_step >= {"torch", "lightning", "transformers", "sam2", "vessel.training.run", "albumentations"}
    assert of_first_step & UNUSED == set()


def test_a_prediction_imports_no_engine_of_training(of_first_step, run, oct_set):
    assert of_first_step  # which made the run
    imported = modules_after(
        "predict", f"ckpt={run}", f"images={oct_set / 'images'}", "phrases=[lumen]", f"out={run.parent / 'predicted'}",
        "threshold=0.5", "workers=0",
    )  # fmt: skip
    assert imported >= {"torch", "transformers", "sam2", "vessel.prediction.command"}
    assert imported & (OF_TRAINING | UNUSED - {"skimage"}) == set()  # overlays are drawn with it
