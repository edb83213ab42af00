"""Check the values of options before anything heavy is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from vessel.errors import VesselError
from vessel.inference.decoders import DECODERS
from vessel.weights.layouts import EXPORT_DTYPES, EXPORT_LAYOUTS


@dataclass(frozen=True)
class Rule:
    """A test of a value, and a description of the values that pass it."""

    accepts: Callable[[Any], bool]
    wanted: str

    def or_null(self) -> Rule:
        """Return the rule that accepts null as well."""
        return Rule(lambda value: value is None or self.accepts(value), f"{self.wanted}, or null")

    def or_word(self, *words: str) -> Rule:
        """Return the rule that accepts some words as well."""
        return Rule(lambda value: value in words or self.accepts(value), f"{self.wanted}, or {' or '.join(words)}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int) -> Rule:
    """Return the rule of whole numbers from `least` on."""
    return Rule(lambda value: _is_whole(value) and value >= least, f"a whole number, {least} or more")


def number(least: float, most: float = math.inf, *, above: bool = False) -> Rule:
    """Return the rule of finite numbers of a range; `above` leaves out `least` itself."""
    begin = f"above {least:g}" if above else f"{least:g} or more"
    end = "" if most == math.inf else f", {most:g} at most"
    return Rule(
        lambda value: _is_number(value) and (value > least if above else value >= least) and value <= most,
        f"a number, {begin}{end}",
    )


def choice(*words: str) -> Rule:
    """Return the rule of one of some words."""
    return Rule(lambda value: value in words, f"one of {', '.join(words)}")


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | ListConfig) and not isinstance(value, str) and len(value) > 0


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping | DictConfig)


def _is_augmentation(value: Any) -> bool:
    return _is_section(value) or (isinstance(value, Sequence | ListConfig) and not isinstance(value, str))


def _is_duration(value: Any) -> bool:
    return _is_section(value) or (isinstance(value, str) and re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value) is not None)


def _are_devices(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"-1|[1-9]\d*|\d+(,\d*)+", value) is not None
    return _is_list(value) or (_is_whole(value) and (value >= 1 or value == -1))


def _is_interval(value: Any) -> bool:
    return (_is_whole(value) and value >= 1) or (isinstance(value, float) and 0 < value <= 1)


def _are_betas(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in value)


SWITCH = Rule(lambda value: isinstance(value, bool), "true or false")
WORD = Rule(_is_word, "a word or more")
PHRASES = Rule(lambda value: _is_word(value) or (_is_list(value) and all(map(_is_word, value))), "phrases, [lumen,cap]")
AUGMENTATION = Rule(_is_augmentation, "a list of transforms, or a section with _target_")
DURATION = Rule(_is_duration, "DAYS:HOURS:MINUTES:SECONDS, for example 00:08:00:00")
DEVICES = Rule(_are_devices, "a number of devices, 1 or more, or a list of them")
INTERVAL = Rule(_is_interval, "batches, 1 or more, or a fraction of an epoch, above 0 and 1.0 at most")
BETAS = Rule(_are_betas, "two numbers of at least 0 and below 1, [0.9,0.999]")
LIMIT = Rule(lambda value: _is_whole(value) and value >= -1, "a whole number, or -1 for no limit")

RULES: Mapping[str, Mapping[str, Rule]] = {
    "train": {
        "name": WORD,
        "seed": whole(0),
        "plan": SWITCH,
        "force": SWITCH,
        "compile": SWITCH,
        "gpu_gb": number(0, above=True).or_null(),
        "activation_checkpointing": SWITCH.or_word("auto"),
        "trainable": WORD,
        "optimizer.lr": number(0, above=True),
        "optimizer.weight_decay": number(0),
        "optimizer.warmup": number(0, 1),
        "optimizer.final": number(0, 1),
        "optimizer.betas": BETAS,
        "loss.lm_weight": number(0),
        "loss.mask_weight": number(0),
        "loss.dice_weight": number(0),
        "loss.points": whole(1),
        "lora.r": whole(0),
        "lora.alpha_ratio": number(0, above=True),
        "lora.dropout": number(0, 1),
        "data.batch_size": whole(1),
        "data.workers": whole(0),
        "data.repeats": whole(1),
        "data.fold": whole(0).or_null(),
        "data.phrases": PHRASES.or_null(),
        "data.augmentation": AUGMENTATION.or_null(),
        "cache.max_gb": number(0, above=True),
        "trainer.devices": DEVICES.or_word("auto"),
        "trainer.num_nodes": whole(1),
        "trainer.max_epochs": LIMIT.or_null(),
        "trainer.max_steps": LIMIT.or_null(),
        "trainer.max_time": DURATION.or_null(),
        "trainer.accumulate_grad_batches": whole(1),
        "trainer.gradient_clip_val": number(0).or_null(),
        "trainer.val_check_interval": INTERVAL.or_null(),
        "trainer.check_val_every_n_epoch": whole(1).or_null(),
        "trainer.log_every_n_steps": whole(1),
    },
    "prepare": {
        "folds": whole(0),
        "gap": whole(0),
        "seed": whole(0),
        "overwrite": SWITCH,
        "synthetic.patients": whole(1),
        "synthetic.frames": whole(1),
        "synthetic.size": whole(64),
        "synthetic.seed": whole(0),
    },
    "evaluate": {
        "data.phrases": PHRASES.or_null(),
        "search": SWITCH,
        "other_data": SWITCH,
        "overwrite": SWITCH,
        "tolerance": number(0).or_null(),
        "batch_size": whole(1),
        "workers": whole(0),
        "network.dtype": choice("auto", *EXPORT_DTYPES),
        "network.compile": SWITCH,
    },
    "predict": {
        "phrases": PHRASES.or_null(),
        "video": SWITCH,
        "overwrite": SWITCH,
        "decode": choice(*DECODERS),
        "max_new_tokens": whole(1),
        "batch_size": whole(1),
        "workers": whole(0),
        "devices": whole(1),
        "network.dtype": choice("auto", *EXPORT_DTYPES),
        "network.compile": SWITCH,
    },
    "export": {
        "layout": choice(*EXPORT_LAYOUTS),
        "dtype": choice(*EXPORT_DTYPES),
        "to_pth": SWITCH,
        "private": SWITCH,
    },
}


def check_values(config: DictConfig, command: str) -> None:
    """Refuse a value that its option cannot have.

    Args:
        config: as Hydra composed it; options that it lacks, or whose value is still missing, are passed over.
        command: such as `train`.

    Raises:
        VesselError: names the option, its value and the values that it can have.
    """
    for key, rule in RULES[command].items():
        section, _, name = key.rpartition(".")
        node = OmegaConf.select(config, section) if section else config
        if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_missing(node, name):
            continue
        value = node[name]
        if not rule.accepts(value):
            raise VesselError(f"{key}={'null' if value is None else value}: must be {rule.wanted}")
