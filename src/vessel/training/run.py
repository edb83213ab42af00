"""Put a training run together from its configuration, and train."""

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

from vessel.checkpoints.reading import read_checkpoint
from vessel.checkpoints.retention import discard_superseded
from vessel.checkpoints.space import checkpoint_bytes, count_checkpoints, require_checkpoint_space
from vessel.checkpoints.writing import AtomicCheckpointIO
from vessel.data.prompt import Prompt
from vessel.errors import VesselError
from vessel.files import size_on_disk
from vessel.loggers import JsonLines, PrivateWandb, wandb_environment
from vessel.memory_plan.request import print_plan, require_memory
from vessel.model.network import Network, NetworkConfig
from vessel.privacy.scanner import Scanner
from vessel.runs.manifest import Manifest, read_result, without_places, write_result
from vessel.training.callbacks.order import ordered
from vessel.training.datamodule import VesselDataModule
from vessel.training.resumption import continued, find_start, require_same_engine
from vessel.training.settings import check, settled, sources
from vessel.training.task import VesselTask
from vessel.weights.build import NetworkPlan
from vessel.weights.checks import require_same_base
from vessel.weights.report import LoadReport


def train(config: DictConfig) -> float | None:
    """Train as configured, into the folder `config.run`.

    Returns:
        the best value of the monitored validation metric; None when nothing was validated.

    Raises:
        VesselError: a key that nothing reads, a mandatory value not given, or bad input further in.
    """
    check(config)
    if config.plan:
        print_plan(config)
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
    _print_next_command(run, best)
    return best


def _limits(config: DictConfig) -> dict[str, str]:
    """Return the limits at which training ends by itself."""
    keys = ("max_epochs", "max_steps", "max_time")
    return {key: str(config.trainer.get(key)) for key in keys}


def _fit(config: DictConfig, run: Path) -> float | None:
    """Put the parts together and train them; the best value of the monitored metric."""
    resumed = find_start(config, run)
    parent = None if resumed is None else Manifest.from_dict(read_checkpoint(resumed)["vessel"])
    config = settled(config, parent)
    prompt = instantiate(config.prompt)
    sizes = instantiate(config.model)
    data = _data_module(config, prompt, sizes)
    plan = NetworkPlan.from_config(
        config,
        tokens=prompt.token_ids,
        new_tokens=prompt.new_tokens,
        phrases=data.phrases,
        weights=sources(config),
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        frozen_dtype=torch.bfloat16 if str(config.trainer.precision).startswith("bf16") else torch.float32,
    )
    manifest = _manifest(config, data)
    scanner = Scanner.beside(data.catalog.root)
    text = json.dumps(without_places(manifest.as_dict()), ensure_ascii=False)
    scanner.require_clean([("the configuration", text), *wandb_environment()], doing="training, which writes it down,")
    if resumed is not None and parent is not None:
        manifest = continued(manifest, parent, resumed, run)
    rank_zero_only(manifest.write)(run)
    rank_zero_only(prompt.save)(run / "tokenizer")

    def build() -> Network:
        network = plan.build()
        if parent is not None:
            require_same_base(parent.weights, plan.reports)
        plan.require_learning(network)
        _require_room(network, trainer, run, keep_frozen=task.keep_frozen)
        known = replace(manifest, weights=tuple(report.summary() for report in plan.reports))
        _print_reports(plan.reports)
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
    require_same_engine(resumed, trainer)
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
def _print_next_command(run: Path, best: float | None) -> None:
    result = "nothing was validated" if best is None else f"best on validation: {best:.3f}"
    path = os.path.relpath(run)
    line = f"\nrun: {path} ({result}); next: python -m vessel.evaluate ckpt={path}"
    Console().print(line, soft_wrap=True, markup=False, highlight=False)


def _data_module(config: DictConfig, prompt: Prompt, sizes: NetworkConfig) -> VesselDataModule:
    with warnings.catch_warnings():
        # albumentations only warns of an argument that it does not know, and leaves it out.
        warnings.filterwarnings("error", message=r"Argument\(s\) .* not valid for transform")
        # Partial, as Hydra would turn dataclasses that it is given into its own configurations.
        make = instantiate(config.data, _partial_=True, _convert_="all")
    data: VesselDataModule = make(prompt=prompt, geometry=sizes.geometry, seed=config.seed)
    return data


@rank_zero_only
def _print_reports(reports: Sequence[LoadReport]) -> None:
    """Print the table of each load of weights."""
    for report in reports:
        Console().print(report.table())


def _quieten_libraries() -> None:
    """Silence hints that would come twice, by Lightning's handlers and by Hydra's; real warnings stay."""
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
    """Collect the facts of the run."""
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


def _require_room(network: Network, trainer: Trainer, run: Path, *, keep_frozen: bool) -> None:
    """Refuse a run whose checkpoints the disk would not hold in the end."""
    stage = 0
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        assert isinstance(trainer.strategy.config, dict)
        stage = trainer.strategy.config["zero_optimization"]["stage"]
    number = count_checkpoints(trainer.callbacks)  # type: ignore[attr-defined]
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
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    return trainer
