"""A training run put together from its configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from vessel.data.module import VesselDataModule
from vessel.errors import VesselError
from vessel.loggers import JsonLines
from vessel.model.plan import NetworkPlan
from vessel.model.sa2va import Sa2VA
from vessel.restore import best_checkpoint, read_checkpoint
from vessel.run import Manifest
from vessel.task import VesselTask

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
    prompt = instantiate(config.prompt)
    sizes = instantiate(config.model)
    data: VesselDataModule = instantiate(config.data, prompt=prompt, views=sizes.views, seed=config.seed)
    plan = NetworkPlan(
        sizes=sizes,
        tokens=prompt.token_ids,
        new_tokens=prompt.new_tokens,
        lora=instantiate(config.lora),
        trainable=config.trainable,
        weights=tuple(config.weights),
        frozen_dtype=torch.bfloat16 if str(config.trainer.precision).startswith("bf16") else torch.float32,
    )
    manifest = _manifest(config, data)
    manifest.write(run)
    prompt.save(run / "tokenizer")

    def build() -> Sa2VA:
        network = plan.build()
        task.manifest["weights"] = [report.summary() for report in plan.reports]
        return network

    task = VesselTask(
        build,
        objective=instantiate(config.objective),
        optimizer=instantiate(config.optimizer),
        keep_frozen=not config.weights,
        manifest=manifest.as_dict(),
    )
    trainer = _trainer(config, run)
    trainer.fit(task, datamodule=data, ckpt_path=_resumed(config.ckpt), weights_only=True)
    best = trainer.checkpoint_callback
    if isinstance(best, ModelCheckpoint) and best.best_model_score is not None:
        return float(best.best_model_score)
    return None


def _quieten_lightning() -> None:
    """Its hints and device lists would come twice, by its own handler and by Hydra's; warnings stay."""
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
    relative = OmegaConf.merge(config, {"run": "."})  # no absolute path of this machine in a manifest
    plain: Any = OmegaConf.to_container(relative, resolve=True)
    facts = data.catalog.manifest
    kept = ("name", "fingerprint", "split_hash", "unit", "note", "n_images", "n_patients", "n_videos")
    return Manifest(
        name=config.name,
        config=plain,
        data={key: facts[key] for key in kept},
        phrases=data.phrases,
        prompt=data.prompt.name,
    )


def _trainer(config: DictConfig, run: Path) -> Trainer:
    callbacks: list[Callback] = [instantiate(node) for node in (config.callbacks or {}).values() if node is not None]
    loggers: list[Logger] = [instantiate(node) for node in (config.logger or {}).values() if node is not None]
    trainer: Trainer = instantiate(
        config.trainer, default_root_dir=str(run), callbacks=callbacks, logger=[JsonLines(run), *loggers]
    )
    return trainer


def _resumed(ckpt: str | None) -> Path | None:
    if ckpt is None:
        return None
    path = Path(ckpt)
    path = best_checkpoint(path) if path.is_dir() else path
    read_checkpoint(path)
    return path
