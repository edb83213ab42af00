"""A training run put together from its configuration."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vessel.checkpoints.reading import find_checkpoint, newest_good, read_checkpoint
from vessel.checkpoints.retention import discard_superseded
from vessel.checkpoints.space import checkpoint_bytes, planned, require_checkpoint_space
from vessel.checkpoints.writing import WholeFiles
from vessel.data.prompt import Prompt
from vessel.errors import VesselError
from vessel.files import size_on_disk
from vessel.loggers import JsonLines, PrivateWandb, wandb_environment
from vessel.memory_plan.request import require_memory, show
from vessel.model.network import Network, NetworkConfig
from vessel.paths import expanded
from vessel.privacy.scanner import Scanner
from vessel.runs.manifest import EXPORT_MANIFEST, Manifest, read_result, without_places, write_result
from vessel.runs.record import differing
from vessel.training.callbacks.order import ordered
from vessel.training.datamodule import VesselDataModule
from vessel.training.settings import check, settled, sources
from vessel.training.task import VesselTask
from vessel.weights.build import NetworkPlan
from vessel.weights.checks import require_same_base
from vessel.weights.digests import fingerprint
from vessel.weights.report import LoadReport
from vessel.weights.sources import open_source
from vessel.weights.zero import is_zero


def train(config: DictConfig) -> float | None:
    """Train as configured, into the folder `config.run`.

    Returns:
        the best value of the monitored validation metric; None when nothing was validated.

    Raises:
        VesselError: a key that nothing reads, a mandatory value not given, or bad input further in.
    """
    check(config)
    if config.plan:
        show(config)
        return None
    plan = require_memory(config)
    config.activation_checkpointing = (
        config.activation_checkpointing is True if plan is None else plan.setup.activation_checkpointing
    )
    _quieten_libraries()
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    if config.resume is not None and (ended := read_result(run)) is not None and ended["limits"] == _limits(config):
        rank_zero_only(print)(f"{os.path.relpath(run)} has come to its end; trainer.max_steps=... makes it longer")
        return ended["best"]
    seed_everything(config.seed, workers=True, verbose=False)
    best = _fit(config, run)
    rank_zero_only(write_result)(run, {"best": best, "limits": _limits(config)})
    _say_what_is_next(run, best)
    return best


def _limits(config: DictConfig) -> dict[str, str]:
    """Return the limits at which training ends by itself."""
    keys = ("max_epochs", "max_steps", "max_time")
    return {key: str(config.trainer.get(key)) for key in keys}


def _fit(config: DictConfig, run: Path) -> float | None:
    """Put the parts together and train them; the best value of the monitored metric."""
    resumed = _beginning(config, run)
    parent = None if resumed is None else Manifest.from_dict(read_checkpoint(resumed)["vessel"])
    config = settled(config, parent)
    prompt = instantiate(config.prompt)
    sizes = instantiate(config.model)
    data = _data_module(config, prompt, sizes)
    plan = _network_plan(config, sizes, prompt, data.phrases)
    manifest = _manifest(config, data)
    scanner = Scanner.beside(data.catalog.root)
    told = json.dumps(without_places(manifest.as_dict()), ensure_ascii=False)
    scanner.require_clean([("the configuration", told), *wandb_environment()], doing="training, which tells it to all,")
    if resumed is not None and parent is not None:
        manifest = _going_on(manifest, parent, resumed, run)
    rank_zero_only(manifest.write)(run)
    rank_zero_only(prompt.save)(run / "tokenizer")

    def build() -> Network:
        network = plan.build()
        if parent is not None:
            require_same_base(parent.weights, plan.reports)
        plan.require_learning(network)
        _require_room(network, trainer, run, keep_frozen=task.keep_frozen)
        known = replace(manifest, weights=tuple(report.summary() for report in plan.reports))
        _tell(plan.reports)
        rank_zero_only(known.write)(run)
        task.manifest = known.as_dict()
        return network

    task = VesselTask(
        build,
        loss_function=instantiate(config.loss),
        optimizer=instantiate(config.optimizer),
        keep_frozen=not config.weights,
        manifest=manifest.as_dict(),
    )
    trainer = _trainer(config, run)
    _require_same_engine(resumed, trainer)
    if resumed is not None and resumed.is_relative_to(run):
        rank_zero_only(discard_superseded)(run, resumed, trainer.callbacks)  # type: ignore[attr-defined]
    for logger in trainer.loggers:
        if isinstance(logger, PrivateWandb):
            logger.scanner = scanner
        logger.log_hyperparams(without_places(manifest.as_dict()))
    trainer.fit(task, datamodule=data, ckpt_path=resumed, weights_only=True)
    saver = trainer.checkpoint_callback
    best = saver.best_model_score if isinstance(saver, ModelCheckpoint) else None
    return None if best is None else float(best)


@rank_zero_only
def _say_what_is_next(run: Path, best: float | None) -> None:
    told = "nothing was validated" if best is None else f"best on validation: {best:.3f}"
    place = os.path.relpath(run)
    line = f"\nrun: {place} ({told}); next: python -m vessel.evaluate ckpt={place}"
    Console().print(line, soft_wrap=True, markup=False, highlight=False)


def _data_module(config: DictConfig, prompt: Prompt, sizes: NetworkConfig) -> VesselDataModule:
    with warnings.catch_warnings():
        # albumentations only warns of an argument that it does not know, and leaves it out.
        warnings.filterwarnings("error", message=r"Argument\(s\) .* not valid for transform")
        # Partial, as Hydra would turn dataclasses that it is given into its own configurations.
        make = instantiate(config.data, _partial_=True, _convert_="all")
    data: VesselDataModule = make(prompt=prompt, geometry=sizes.geometry, seed=config.seed)
    return data


def _network_plan(config: DictConfig, sizes: NetworkConfig, prompt: Prompt, phrases: Sequence[str]) -> NetworkPlan:
    return NetworkPlan(
        sizes=sizes,
        tokens=prompt.token_ids,
        new_tokens=prompt.new_tokens,
        phrases=phrases,
        lora=instantiate(config.lora),
        trainable=config.trainable,
        weights=sources(config),
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        frozen_dtype=torch.bfloat16 if str(config.trainer.precision).startswith("bf16") else torch.float32,
    )


@rank_zero_only
def _tell(reports: Sequence[LoadReport]) -> None:
    """Print what loads did."""
    for report in reports:
        Console().print(report.table())


def _quieten_libraries() -> None:
    """Lightning's hints and device lists would come twice, by its handlers and by Hydra's; real warnings stay."""
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
    # Metrics are reduced by torchmetrics already, and a run that goes on has files in its folder.
    for known in (".*sync_dist=True", ".*exists and is not empty"):
        warnings.filterwarnings("ignore", message=known, module="lightning")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")  # of tensors of a few numbers
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
    # Which rank each process is, which `global batch` tells; and how DeepSpeed tries gcc.
    for name in ("lightning.fabric.utilities.distributed", "lightning.pytorch.strategies.deepspeed", "compilers"):
        logging.getLogger(name).setLevel(logging.WARNING)


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
    return manifest


def _going_on(manifest: Manifest, parent: Manifest, resumed: Path, run: Path) -> Manifest:
    """A run that goes on must have the data, split and phrases of the one before; it may be that very run."""
    same = ("fingerprint", "split_hash", "fold")
    parted = [key for key in same if parent.data.get(key) != manifest.data.get(key)]
    if parted or parent.phrases != manifest.phrases:
        raise VesselError(
            f"ckpt={resumed}: {', '.join(parted) or 'phrases'} of that run differ from this one's: patients it was "
            "trained on could be validated on; go on with its own data set, split and phrases"
        )
    if resumed.is_relative_to(run):
        if manifest.config["resume"] == "auto" and (others := differing(parent.config, manifest.config)):
            told = ", ".join(others)
            raise VesselError(f"{run}: trained with other settings: {told}; resume={run} goes on with these")
        return replace(manifest, created=parent.created, parent=parent.parent)
    return replace(
        manifest, parent={"name": parent.name, "fingerprint": fingerprint(open_source(str(resumed)).tensors())}
    )


def _require_room(network: Network, trainer: Trainer, run: Path, *, keep_frozen: bool) -> None:
    """Refuse a run whose checkpoints the disk would not hold in the end."""
    stage = 0
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        assert isinstance(trainer.strategy.config, dict)
        stage = trainer.strategy.config["zero_optimization"]["stage"]
    number = planned(trainer.callbacks)  # type: ignore[attr-defined]
    each = checkpoint_bytes(network.parameters(), keep_frozen=keep_frozen, stage=stage)
    there = size_on_disk(run / "checkpoints")  # of a run that goes on, and replaces them
    require_checkpoint_space(run, max(number * each - there, each if number else 0), number)


def _trainer(config: DictConfig, run: Path) -> Trainer:
    callbacks: list[Callback] = ordered(instantiate(n) for n in (config.callbacks or {}).values() if n is not None)
    if config.cache is not None:
        callbacks.insert(0, instantiate(config.cache))  # it fills before anything else begins
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
    trainer.strategy.checkpoint_io = WholeFiles()
    return trainer


def _beginning(config: DictConfig, run: Path) -> Path | None:
    """The checkpoint to go on from: of this very folder where the run is resumed, else the one that is named."""
    if config.resume is not None:
        found, skipped = newest_good(run)
        if found is None and config.resume != "auto":
            reasons = "".join(f"\n  {reason}" for reason in skipped) or " it has none"
            raise VesselError(f"resume={config.resume}: no good checkpoint to go on from;{reasons}")
        _tell_skipped(run, found, skipped)
        if found is not None:
            return found
    if config.ckpt is None:
        return None
    path = expanded(config.ckpt)
    if (path / EXPORT_MANIFEST).is_file():
        raise VesselError(
            f"ckpt={config.ckpt}: an export has no optimizer to go on with; start from it with weights=[{config.ckpt}]"
        )
    return find_checkpoint(path, ("last", "best")) if path.is_dir() else path


@rank_zero_only
def _tell_skipped(run: Path, found: Path | None, skipped: Sequence[str]) -> None:
    for reason in skipped:
        print(f"passed over {reason}")
    if skipped and found is None:
        print(f"no good checkpoint in {os.path.relpath(run)}: training begins anew")


def _require_same_engine(resumed: Path | None, trainer: Trainer) -> None:
    if resumed is not None and is_zero(resumed) and not isinstance(trainer.strategy, DeepSpeedStrategy):
        raise VesselError(
            f"{resumed}: written under ZeRO, whose optimizer only ZeRO takes over: go on with trainer=zero3, on one "
            f"device with trainer.devices=1 too; or begin with its weights, weights=[...,{resumed}]"
        )
