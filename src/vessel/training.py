"""A training run put together from its configuration."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vessel.checkpoints.reading import find_checkpoint, read_checkpoint
from vessel.data.identity import RawIdentifiers, mapping_folder
from vessel.data.module import VesselDataModule
from vessel.data.prompt import Prompt
from vessel.errors import VesselError
from vessel.loggers import JsonLines
from vessel.model.architecture import read_template
from vessel.model.checks import require_same_base
from vessel.model.plan import NetworkPlan
from vessel.model.sa2va import Sa2VA, Sizes
from vessel.model.weights.digests import fingerprint
from vessel.model.weights.entry import Weights
from vessel.model.weights.report import LoadReport
from vessel.model.weights.sources import open_source
from vessel.places import expanded
from vessel.restore import EXPORT_MANIFEST
from vessel.run import Manifest, without_places
from vessel.task import VesselTask

WEIGHTS = "weights"  # of prompt.tokenizer and prompt.template: those of the weights
ROOT_KEYS = (
    *("model", "prompt", "lora", "objective", "optimizer", "data", "trainer", "callbacks", "logger"),
    *("name", "seed", "ckpt", "weights", "trainable", "run"),
)


def train(config: DictConfig) -> float | None:
    """Train as configured, into the folder `config.run`.

    Returns:
        the best value of the monitored validation metric; None when nothing was validated.

    Raises:
        VesselError: a key that nothing reads, a mandatory value not given, or bad input further in.
    """
    _check(config)
    _quieten_lightning()
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    seed_everything(config.seed, workers=True, verbose=False)
    resumed = _resumed(config.ckpt)
    parent = None if resumed is None else Manifest.from_dict(read_checkpoint(resumed)["vessel"])
    config = _settled(config, parent)
    prompt = instantiate(config.prompt)
    sizes = instantiate(config.model)
    # Partial, as Hydra would turn dataclasses that it is given into its own configurations.
    data: VesselDataModule = instantiate(config.data, _partial_=True)(
        prompt=prompt, views=sizes.views, seed=config.seed
    )
    plan = _network_plan(config, sizes, prompt)
    manifest = _manifest(config, data)
    if resumed is not None and parent is not None:
        manifest = _going_on(manifest, parent, resumed)
    manifest.write(run)
    prompt.save(run / "tokenizer")

    def build() -> Sa2VA:
        network = plan.build()
        if parent is not None:
            require_same_base(parent.weights, plan.reports)
        _refuse_random_seg(network, plan)
        known = replace(manifest, weights=tuple(report.summary() for report in plan.reports))
        _tell(plan.reports)
        known.write(run)
        task.manifest = known.as_dict()
        return network

    task = VesselTask(
        build,
        objective=instantiate(config.objective),
        optimizer=instantiate(config.optimizer),
        keep_frozen=not config.weights,
        manifest=manifest.as_dict(),
    )
    trainer = _trainer(config, run)
    for logger in trainer.loggers:
        logger.log_hyperparams(without_places(manifest.as_dict()))
    trainer.fit(task, datamodule=data, ckpt_path=resumed, weights_only=True)
    best = trainer.checkpoint_callback
    score = best.best_model_score if isinstance(best, ModelCheckpoint) else None
    _say_what_is_next(run, None if score is None else float(score))
    return None if score is None else float(score)


@rank_zero_only
def _say_what_is_next(run: Path, best: float | None) -> None:
    told = "nothing was validated" if best is None else f"best on validation: {best:.3f}"
    place = os.path.relpath(run)
    line = f"\nrun: {place} ({told}); next: python -m vessel.evaluate ckpt={place}"
    Console().print(line, soft_wrap=True, markup=False, highlight=False)


def _network_plan(config: DictConfig, sizes: Sizes, prompt: Prompt) -> NetworkPlan:
    return NetworkPlan(
        sizes=sizes,
        tokens=prompt.token_ids,
        new_tokens=prompt.new_tokens,
        lora=instantiate(config.lora),
        trainable=config.trainable,
        weights=_sources(config),
        frozen_dtype=torch.bfloat16 if str(config.trainer.precision).startswith("bf16") else torch.float32,
    )


def _settled(config: DictConfig, parent: Manifest | None) -> DictConfig:
    """The configuration as it can be repeated from anywhere: whole paths, hub ids with their commits, prompts named.

    A run that goes on has the commits of the one before.
    """
    entries = _sources(config)
    if parent is not None:
        commits = {entry.source: entry.revision for entry in Weights.listed(parent.config["weights"])}
        entries = [replace(e, revision=e.revision or commits.get(e.source)) for e in entries]
    entries = [entry.pinned() for entry in entries]
    settled = OmegaConf.merge(config, {"weights": [asdict(entry) for entry in entries]})
    assert isinstance(settled, DictConfig)
    for section, key in (("data", "root"), ("prompt", "tokenizer")):
        place = config[section].get(key)
        if place is not None and expanded(place).exists():
            settled[section][key] = str(expanded(place).absolute())
    if WEIGHTS in (config.prompt.tokenizer, config.prompt.template):
        folders = [source for source in map(open_source, entries) if source.config]
        if not folders:
            raise VesselError(
                "prompt=sa2va takes tokenizer and template from the folder that training starts from, and "
                "weights=[...] names none; name one, or choose prompt=small"
            )
        for key, found in {"tokenizer": str(folders[0].path), "template": read_template(folders[0].config)}.items():
            if settled.prompt[key] == WEIGHTS:
                settled.prompt[key] = found
    return settled


def _sources(config: DictConfig) -> list[Weights]:
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return Weights.listed(plain["weights"])


@rank_zero_only
def _tell(reports: Sequence[LoadReport]) -> None:
    """Print what loads did."""
    for report in reports:
        Console().print(report.table())


def _quieten_lightning() -> None:
    """Its hints and device lists would come twice, by its own handler and by Hydra's; real warnings stay."""
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
    logging.getLogger("lightning.pytorch").handlers.clear()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


def _check(config: DictConfig) -> None:
    if unknown := sorted(set(map(str, config)).difference(ROOT_KEYS)):
        raise VesselError(f"unknown configuration key(s) {unknown}; the known ones are {sorted(ROOT_KEYS)}")
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise VesselError(
            f"no value for {', '.join(missing)}: give it on the command line, for example {missing[0]}=..."
        )


def _manifest(config: DictConfig, data: VesselDataModule) -> Manifest:
    """Facts of the run."""
    relative = OmegaConf.merge(config, {"run": "."})  # loggers and callbacks name the run's folder
    plain: Any = OmegaConf.to_container(relative, resolve=True)
    facts = data.catalog.manifest
    kept = ("name", "fingerprint", "split_hash", "unit", "note", "n_images", "n_patients", "n_videos")
    manifest = Manifest(
        name=config.name,
        config=plain,
        data={key: facts[key] for key in kept} | {"fold": data.fold},
        phrases=data.phrases,
        prompt=data.prompt.name,
    )
    root = mapping_folder(data.catalog.root.absolute())
    told = json.dumps(without_places(manifest.as_dict()), ensure_ascii=False)
    if found := RawIdentifiers(root if root.is_dir() else None).find(told):
        raise VesselError(
            f"the configuration holds what looks like a patient's name or id ({', '.join(found[:3])}); loggers and "
            "exports would repeat it: take it out of name, phrases and options"
        )
    return manifest


def _going_on(manifest: Manifest, parent: Manifest, resumed: Path) -> Manifest:
    """A run that goes on must have the data, split and phrases of the one before."""
    same = ("fingerprint", "split_hash", "fold")
    differing = [key for key in same if parent.data.get(key) != manifest.data.get(key)]
    if differing or parent.phrases != manifest.phrases:
        raise VesselError(
            f"ckpt={resumed}: {', '.join(differing) or 'phrases'} of that run differ from this one's: patients it was "
            "trained on could be validated on; go on with its own data set, split and phrases"
        )
    return replace(
        manifest, parent={"name": parent.name, "fingerprint": fingerprint(open_source(str(resumed)).tensors())}
    )


def _refuse_random_seg(network: Sa2VA, plan: NetworkPlan) -> None:
    groups = network.trainable_groups()
    if plan.trainable == "lora" and "lora" not in groups:
        raise VesselError("trainable=lora, but lora=none: choose adapters, such as lora=r128, or another trainable=")
    if not groups:
        raise VesselError(f"trainable={plan.trainable}: nothing would train; choose lora, decoder_only or all")
    if not plan.seg_is_trained and "tokens" not in groups:
        raise VesselError(
            f"trainable={plan.trainable} from weights that do not know [SEG]: it would stay random for ever. Start "
            "from the weights of a Sa2VA, weights=[...], or choose trainable=all"
        )


def _trainer(config: DictConfig, run: Path) -> Trainer:
    callbacks: list[Callback] = [instantiate(node) for node in (config.callbacks or {}).values() if node is not None]
    loggers: list[Logger] = [instantiate(node) for node in (config.logger or {}).values() if node is not None]
    try:
        trainer: Trainer = instantiate(
            config.trainer, default_root_dir=str(run), callbacks=callbacks, logger=[JsonLines(run), *loggers]
        )
    except InstantiationException as error:
        # such as a GPU where there is none
        if isinstance(error.__cause__, MisconfigurationException | ValueError | ModuleNotFoundError):
            raise VesselError(f"trainer: {error.__cause__}; trainer=auto takes what is there") from error
        raise
    return trainer


def _resumed(ckpt: str | None) -> Path | None:
    if ckpt is None:
        return None
    path = expanded(ckpt)
    if (path / EXPORT_MANIFEST).is_file():
        raise VesselError(f"ckpt={ckpt}: an export has no optimizer to go on with; start from it with weights=[{ckpt}]")
    return find_checkpoint(path, ("last", "best")) if path.is_dir() else path
