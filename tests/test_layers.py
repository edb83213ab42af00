"""Imports point one way, modules stay small, and nothing heavy is imported too early. Read from the AST."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src/vessel"
FILES = sorted(SRC.rglob("*.py"))

# From the ground up. A part imports from the rows above it and from itself, never from its own row.
LAYERS = (
    ("errors", "batch", "plotting"),
    ("paths", "losses", "metrics", "hub"),
    ("files", "model"),
    ("runs",),  # below the weights, which read what a run has written under old names
    ("data", "weights"),
    ("privacy", "checkpoints", "processes"),
    ("loggers", "inference", "memory_plan"),
    ("reporting", "training", "prediction", "cli"),
    ("evaluation", "feature_cache", "publishing"),
    ("prepare", "train", "evaluate", "predict", "export", "demo"),
)
ROW = {part: row for row, parts in enumerate(LAYERS) for part in parts}
ENTRIES = LAYERS[-1]
HYDRA_APPS = {"prepare", "train", "evaluate", "predict", "export"}

# Arrows that the rows would allow and the design forbids: part of the importing side, part of the imported side.
NO_ARROW = {
    ("evaluation", "training"),
    ("memory_plan", "training"),
    ("prediction", "training"),
    ("publishing", "training"),
    *(("data", other) for other in ("model", "weights", "runs", "processes", "losses")),
    *(("reporting", other) for other in ("model", "data", "weights", "inference", "checkpoints")),
    *((part, "feature_cache") for part in ROW if part != "feature_cache"),
}

# Libraries that a part does not know: plain PyTorch below the training, no framework in the data.
FORBIDDEN = {
    "batch": {"lightning", "hydra", "omegaconf", "wandb", "transformers", "numpy"},
    "losses": {"lightning", "hydra", "omegaconf", "wandb", "transformers"},
    "metrics": {"lightning", "hydra", "omegaconf", "wandb", "transformers"},
    "model": {"lightning", "omegaconf", "wandb", "safetensors"},
    "data": {"lightning", "hydra", "omegaconf", "wandb", "peft", "sam2"},
    "memory_plan": {"lightning", "wandb"},
    "evaluation": {"lightning"},
    "reporting": {"torch", "lightning"},
    "files": {"torch"},
}


def part_of(file: Path) -> str:
    return file.relative_to(SRC).parts[0].removesuffix(".py")


def name_of(file: Path) -> str:
    return file.relative_to(SRC).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of imported modules; `from a import b` counts as a.b, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(part: str, source: str) -> list[str]:
    """Imports that this part must not have."""
    wrong = []
    for module in imported(ast.parse(source)):
        package, _, rest = module.partition(".")
        other = rest.split(".")[0]
        upward = package == "vessel" and other != part and ROW[other] >= ROW[part]
        if upward or (package == "vessel" and (part, other) in NO_ARROW):
            wrong.append(module)
        if package in FORBIDDEN.get(part, ()):
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("file", [file for file in FILES if file.parent != SRC or file.stem != "__init__"], ids=name_of)
def test_imports_point_one_way(file):
    assert part_of(file) in ROW, f"give {part_of(file)} its place in LAYERS"
    assert wrong_imports(part_of(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("data", "from vessel.model.sa2va import Sa2VA"),
        ("model", "def late():\n    import vessel.data.catalog"),
        ("model", "from vessel import data"),
        ("batch", "from vessel.losses import dice_loss"),
        ("losses", "import lightning.pytorch as pl"),
        ("metrics", "from omegaconf import DictConfig"),
        ("train", "from vessel.evaluate import main"),
        # the seven imports that pointed the wrong way before the packages were drawn
        ("data", "from vessel.training.resume import Place"),
        ("data", "from vessel.processes.signals import outlive_signals"),
        ("memory_plan", "from vessel.training.task import VesselTask"),
        ("evaluation", "from vessel.training.callbacks.threshold_sweep import ThresholdSweep"),
        ("reporting", "from vessel.weights.files import open_files"),
        ("processes", "from vessel.training.run import train"),
        ("model", "from vessel.weights.names import from_sam2"),
        ("prediction", "from vessel.feature_cache.store import FeatureStore"),
    ],
)
def test_a_wrong_import_is_seen(part, source):
    assert len(wrong_imports(part, source)) == 1


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_entry_points_are_hydra_apps(file):
    nodes = ast.walk(ast.parse(file.read_text()))
    uses = any(isinstance(node, ast.Attribute) and ast.unparse(node) == "hydra.main" for node in nodes)
    assert uses == (part_of(file) in HYDRA_APPS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_sizes_and_names(file):
    source = file.read_text()
    assert len(source.splitlines()) <= 300
    assert not set(file.relative_to(SRC).with_suffix("").parts) & {"utils", "helpers", "common", "misc"}
    if file.name == "__init__.py":
        assert source == ""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize(
    ("module", "library"),
    [("reporting.page", "torch"), ("files", "torch"), ("data.preparation", "lightning"), ("cli.values", "torch")],
)
def test_a_light_module_imports_nothing_heavy(module, library):
    code = f"import sys; import vessel.{module}; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_vessel_is_light():
    code = "import sys; before = set(sys.modules); import vessel; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['vessel']"
