"""A trained network found again, with everything that belongs to it, from whatever the user calls `ckpt`."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from vessel.batch import Views
from vessel.data.prompt import Prompt
from vessel.errors import VesselError
from vessel.model.plan import NetworkPlan, local_folder
from vessel.model.sa2va import Sa2VA
from vessel.model.weights import fingerprint, load_state, read_safetensors, to_native
from vessel.run import MANIFEST, Manifest

EXPORT_MANIFEST = "vessel.json"


@dataclass(frozen=True)
class Restored:
    """A trained network and what it needs.

    Attributes:
        network: in evaluation mode, on the CPU, adapters in place when the checkpoint has them.
        prompt, views: wording and cutting that belong to the network.
        manifest: of the run, with the threshold and the fingerprint of these weights.
        source: the checkpoint file or export folder that was read.
    """

    network: Sa2VA
    prompt: Prompt
    views: Views
    manifest: Manifest
    source: Path

    @property
    def threshold(self) -> float:
        """Threshold chosen on validation, 0.5 where none was."""
        return 0.5 if self.manifest.threshold is None else self.manifest.threshold


def restore(ckpt: str) -> Restored:
    """Read a run folder (its best checkpoint), a checkpoint file, an export folder or the hub id of an export.

    Raises:
        VesselError: nothing there, damaged, of a kind that holds no trained vessel network, or tensors missing.
    """
    path = Path(ckpt)
    if path.is_file():
        return _from_checkpoint(path)
    folder = path if path.is_dir() else local_folder(ckpt)
    if (folder / EXPORT_MANIFEST).is_file():
        return _from_export(folder)
    return _from_checkpoint(find_checkpoint(folder))


def find_checkpoint(run: Path, kinds: tuple[str, ...] = ("best", "last")) -> Path:
    """The newest checkpoint of a run folder, of the first kind that is there.

    Args:
        run: folder of the run.
        kinds: `best` by validation, `last` written.

    Raises:
        VesselError: the folder is no run, or has no checkpoint yet.
    """
    for kind in kinds:
        for folder in (run, run / "checkpoints"):
            if found := sorted(folder.glob(f"{kind}*.ckpt"), key=lambda path: path.stat().st_mtime):
                return found[-1]
    what = "a run without checkpoint" if (run / MANIFEST).is_file() else "neither a run nor an export of vessel"
    raise VesselError(f"{run}: {what}; give a run folder (outputs/<name>/<time>), one of its checkpoints, or an export")


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a Lightning checkpoint of vessel; code in the file is never run.

    Raises:
        VesselError: damaged, or another kind of file, with the remedy.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise VesselError(
            f"{path}: not a checkpoint that can be read safely ({type(error).__name__}); vessel.train writes "
            "outputs/<name>/<time>/checkpoints/*.ckpt, base weights belong into its `weights=[...]`"
        ) from error
    if not isinstance(checkpoint, dict) or "vessel" not in checkpoint:
        raise VesselError(
            f"{path}: weights, but no checkpoint of vessel.train: nothing says what network or data they belong to. "
            "Base weights belong into `weights=[...]` of vessel.train"
        )
    return checkpoint


def _from_checkpoint(path: Path) -> Restored:
    checkpoint = read_checkpoint(path)
    state = checkpoint["state_dict"]
    sweep = checkpoint.get("callbacks", {}).get("ThresholdSweep", {})
    manifest = replace(
        Manifest.from_dict(checkpoint["vessel"]),
        threshold=sweep.get("threshold"),
        fingerprint=fingerprint(state.items()),
    )
    beside = path.parent.parent / "tokenizer"
    prompt, plan = _plan(manifest.config, str(beside) if beside.is_dir() else None)
    network = plan.build()
    report = load_state(network, _of_network(state), str(path))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    absent = trained.intersection(report.missing)
    if absent or report.unexpected or report.mismatched or not report.loaded:
        wrong = [*report.mismatched, *report.unexpected, *sorted(absent)] or ["nothing was loaded"]
        raise VesselError(f"{path}: {len(wrong)} tensors do not fit the network of its manifest (first: {wrong[0]})")
    return Restored(network.eval(), prompt, plan.sizes.views, manifest, path)


def _from_export(folder: Path) -> Restored:
    manifest = Manifest.from_dict(json.loads((folder / EXPORT_MANIFEST).read_text()))
    config = {**manifest.config, "lora": {**manifest.config["lora"], "r": 0}, "weights": []}
    prompt, plan = _plan(config, str(folder))
    network = plan.build()
    load_state(network, to_native(read_safetensors(folder)), str(folder)).require_complete()
    return Restored(network.eval(), prompt, plan.sizes.views, manifest, folder)


def _plan(config: Mapping[str, Any], tokenizer: str | None) -> tuple[Prompt, NetworkPlan]:
    parts = OmegaConf.create({k: config[k] for k in ("model", "lora", "prompt")})
    if tokenizer is not None:
        parts.prompt.tokenizer = tokenizer
    prompt = instantiate(parts.prompt)
    plan = NetworkPlan(
        sizes=instantiate(parts.model),
        tokens=prompt.token_ids,
        new_tokens=prompt.new_tokens,
        lora=instantiate(parts.lora),
        trainable=config["trainable"],
        weights=config["weights"],
    )
    return prompt, plan


def _of_network(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the network from those of the task: the prefix `network.` falls away."""
    prefix = "network."
    return ((name.removeprefix(prefix), tensor) for name, tensor in state.items() if name.startswith(prefix))
