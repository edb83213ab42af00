"""The configuration of a training run: checked, and settled so that it can be repeated from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vessel.errors import VesselError
from vessel.memory_plan.request import AUTO
from vessel.paths import expanded
from vessel.runs.manifest import Manifest
from vessel.runs.old_names import OPTIONS
from vessel.weights.architecture import read_template
from vessel.weights.entry import Weights
from vessel.weights.recognition import open_source

WEIGHTS = "weights"  # of prompt.tokenizer and prompt.template: those of the weights; with AUTO only if there are any
SMALL: dict[str, str | None] = {"tokenizer": None, "template": "qwen_chat"}
LANGUAGE = "vessel.model.sa2va.Sa2VAConfig"  # of the networks with a language model
ROOT_KEYS = (
    *("model", "prompt", "lora", "loss", "optimizer", "data", "trainer", "callbacks", "logger", "cache"),
    *("name", "seed", "ckpt", "resume", "weights", "trainable", "activation_checkpointing", "compile", "run"),
    *("plan", "gpu_gb", "force"),
)


def check(config: DictConfig) -> None:
    """Refuse a configuration that cannot be what was meant.

    Raises:
        VesselError: a key that nothing reads, a mandatory value not given, or an unknown choice.
    """
    if not isinstance(config.activation_checkpointing, bool) and config.activation_checkpointing != AUTO:
        raise VesselError(f"activation_checkpointing={config.activation_checkpointing}: choose true, false or auto")
    if not isinstance(config.compile, bool):
        raise VesselError(f"compile={config.compile}: choose true or false")
    if unknown := sorted(set(map(str, config)).difference(ROOT_KEYS)):
        renamed = "".join(
            f"; {key} is now called {OPTIONS['train'][key]}" for key in unknown if key in OPTIONS["train"]
        )
        raise VesselError(f"unknown configuration key(s) {unknown}{renamed}; the known ones are {sorted(ROOT_KEYS)}")
    for key, name in OPTIONS["train"].items():
        if "." in key and OmegaConf.select(config, key) is not None:
            raise VesselError(f"unknown configuration key {key}; {key} is now called {name}")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing and not config.plan:  # which needs no data
        raise VesselError(
            f"no value for {', '.join(missing)}: give it on the command line, for example {missing[0]}=..."
        )


def settled(config: DictConfig, parent: Manifest | None) -> DictConfig:
    """Return the configuration as it can be repeated from anywhere: absolute paths, commits of hub ids, prompts named.

    A resumed run has the commits of the one before.

    Raises:
        VesselError: a source is not found, or the prompt is to come from sources of which none has one.
    """
    entries = sources(config)
    if parent is not None:
        commits = {entry.source: entry.revision for entry in Weights.listed(parent.config["weights"])}
        entries = [replace(e, revision=e.revision or commits.get(e.source)) for e in entries]
    entries = [entry.pinned() for entry in entries]
    whole = OmegaConf.merge(config, {"weights": [asdict(entry) for entry in entries]})
    assert isinstance(whole, DictConfig)
    for section, key in (("data", "root"), ("prompt", "tokenizer")):
        path = config[section].get(key)
        if path not in (None, AUTO, WEIGHTS) and expanded(path).exists():
            whole[section][key] = str(expanded(path).absolute())
    _settle_prompt(whole, entries)
    return whole


def _settle_prompt(config: DictConfig, entries: Sequence[Weights]) -> None:
    """Name the tokenizer and the template that `auto` and `weights` stand for."""
    prompt = config.prompt
    if not {AUTO, WEIGHTS} & {prompt.tokenizer, prompt.template}:
        return
    folders = [s for s in map(open_source, entries) if s.config and not s.kind.needs_base]
    if folders and (WEIGHTS in (prompt.tokenizer, prompt.template) or config.model._target_ == LANGUAGE):
        found: dict[str, str | None] = {"tokenizer": str(folders[0].path), "template": read_template(folders[0].config)}
    elif WEIGHTS in (prompt.tokenizer, prompt.template):
        raise VesselError(
            "prompt=sa2va takes tokenizer and template from the folder that training starts from, and weights=[...] "
            "names none; name one, or choose prompt=small"
        )
    else:
        found = SMALL
    for key, value in found.items():
        if prompt[key] in (AUTO, WEIGHTS):
            prompt[key] = value


def sources(config: DictConfig) -> list[Weights]:
    """List the weights that training starts from, as given."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return Weights.listed(plain["weights"])
