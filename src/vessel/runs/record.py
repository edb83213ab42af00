"""The record of its settings that Hydra leaves in a run's folder: read, compared, and noted anew when they changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vessel.errors import VesselError
from vessel.runs.old_names import present_config, present_option

RECORD = ".hydra"
SETTINGS = f"{RECORD}/config.yaml"  # as given, before anything is settled
OVERRIDES = f"{RECORD}/overrides.yaml"
HYDRA = f"{RECORD}/hydra.yaml"

_LANGUAGE = "vessel.model.sa2va.Sa2VAConfig"  # of the networks that are asked in words

# What may differ between a run and its continuation: how it runs and what it shows, not what it computes.
FREE = (
    *(
        "logger",
        "callbacks",
        "cache",
        "resume",
        "run",
        "plan",
        "force",
        "gpu_gb",
        "activation_checkpointing",
        "compile",
    ),
    "data.workers",
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "plugins", "enable_*")),
    *(f"trainer.{key}" for key in ("max_epochs", "max_steps", "max_time", "val_check_interval", "limit_val_batches")),
    *(f"trainer.{key}" for key in ("check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps")),
)


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the differences of two configurations, as `key=value (there other)`, without the keys in `FREE`.

    Args:
        before: plain and nested, of the run that is there.
        now: likewise, of the run that would go on with it.
    """
    theirs, ours, absent = dict(_leaves(_with_auto(before))), dict(_leaves(_with_auto(now))), object()
    return [
        f"{key}={ours.get(key, 'absent')} (there {theirs.get(key, 'absent')})"
        for key in {**ours, **theirs}
        if ours.get(key, absent) != theirs.get(key, absent)
    ]


def _with_auto(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write prompt=auto where `small` or `sa2va` says the same: older runs had no `auto`."""
    prompt, model = config.get("prompt"), config.get("model")
    if not isinstance(prompt, Mapping) or not isinstance(model, Mapping):
        return config
    from_weights = config.get("weights") and model.get("_target_") == _LANGUAGE
    same = ("weights", "weights") if from_weights else (None, "qwen_chat")
    if (prompt.get("tokenizer"), prompt.get("template")) != same:
        return config
    return {**config, "prompt": {**prompt, "tokenizer": "auto", "template": "auto"}}


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their full key."""
    if any(fnmatchcase(key, free) for free in FREE):
        return
    if not isinstance(node, Mapping):
        yield key, node
        return
    for name, child in node.items():
        yield from _leaves(child, f"{key}.{name}" if key else str(name))


def settings_of(run: Path) -> dict[str, Any]:
    """The configuration of a run as it was given: plain and nested, interpolations as they are.

    Raises:
        VesselError: its record cannot be read, or holds none.
    """
    settings = _read(run / SETTINGS)
    if not isinstance(settings, dict) or not settings:
        raise VesselError(f"{run / SETTINGS} holds no settings")
    return present_config(settings)


def options_of(run: Path) -> list[str]:
    """Return the options that a run was given on the command line, with the names of today.

    Raises:
        VesselError: its record cannot be read, or is no list.
    """
    options = _read(run / OVERRIDES)
    if not isinstance(options, list):
        raise VesselError(f"{run / OVERRIDES} holds no options")
    return [present_option(str(option), "train") for option in options]


def config_dir_of(run: Path) -> str | None:
    """The `--config-dir` that a run was given."""
    if not (run / HYDRA).is_file():
        return None
    sources = _read(run / HYDRA)["hydra"]["runtime"]["config_sources"]
    return next((source["path"] for source in sources if source["provider"] == "command-line"), None)


def checkpoints_of(run: Path) -> set[str]:
    """Names of what a run has saved, good or not."""
    # A name with a dot is what a killed save has left.
    return {path.name for path in (run / "checkpoints").glob("*") if not path.name.startswith(".")}


@contextmanager
def noted(config: DictConfig, run: Path) -> Iterator[None]:
    """Replace the record of a folder that goes on when its settings of now have led to a checkpoint.

    Before that they may be refused, and the folder would no longer be known by its own. Hydra itself replaces it where
    a new run begins, or where `hydra.run.dir=` or `hydra.sweep.dir=` named the folder.
    """
    before = checkpoints_of(run)
    try:
        yield
    finally:
        hydra = HydraConfig.get()
        if hydra.output_subdir is None and (run / RECORD).is_dir() and checkpoints_of(run) - before:
            OmegaConf.save(config, run / SETTINGS)
            OmegaConf.save(hydra.overrides.task, run / OVERRIDES)


def _read(file: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise VesselError(f"{file} cannot be read ({reason})") from error
