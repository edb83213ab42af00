"""`--help` answers at once and names every option."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CONF = Path(__file__).parents[1] / "conf"
HEAVY = {
    "torch", "lightning", "transformers", "peft", "sam2", "deepspeed", "numpy", "pandas", "matplotlib", "skimage",
    "cv2", "wandb", "rich",
}  # fmt: skip


def options(node, prefix=""):
    """Keys of a configuration file that a user may set, nested ones with a dot."""
    for key, value in node.items():
        if prefix == "" and key in ("defaults", "hydra"):
            continue
        if isinstance(value, dict):
            yield from options(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def explained(text):
    """Words that begin a line of the list of options; `a.{b,c}` stands for a.b and a.c."""
    names = set()
    for word in re.findall(r"^(\S+)(?:  .*)?$", text, flags=re.MULTILINE):
        group, brace, inner = word.partition("{")
        names |= {group + name for name in inner.rstrip("}").split(",")} if brace else {word}
    return names


@pytest.fixture(scope="module", params=["prepare", "train", "evaluate", "predict", "export"])
def helped(request):
    command = [sys.executable, "-X", "importtime", "-m", f"vessel.{request.param}", "--help"]
    return request.param, subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_needs_no_heavy_library(helped):
    _, done = helped
    assert done.returncode == 0
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in modules
    assert {module.split(".")[0] for module in modules} & HEAVY == set()


def test_help_explains_every_option(helped):
    verb, done = helped
    config = yaml.safe_load((CONF / f"{verb}.yaml").read_text())
    assert set(options(config)) - explained(done.stdout) == set()
    assert f"python -m vessel.{verb} " in done.stdout


def test_help_of_train_names_every_choice(helped):
    verb, done = helped
    groups = [folder.relative_to(CONF).as_posix() for folder in CONF.rglob("*") if folder.is_dir()]
    for group in [name for name in groups if name.split("/")[0] != "hydra"]:
        choices = {file.stem for file in (CONF / group).glob("*.yaml")} - {"internvl"}  # a base, not a size
        if verb == "train":
            assert group in {name.partition("@")[0] for name in explained(done.stdout)}
            assert {choice for choice in choices if not re.search(rf"\b{choice}\b", done.stdout)} == set(), group
