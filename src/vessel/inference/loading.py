"""A trained network found again, with everything that belongs to it, from whatever the user calls `ckpt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from vessel.batch import InputGeometry
from vessel.checkpoints.reading import find_checkpoint, read_checkpoint
from vessel.data.prompt import Prompt
from vessel.errors import VesselError
from vessel.files import read_json, readable
from vessel.inference.decision import Decision, read_decision
from vessel.inference.options import LoadSettings
from vessel.model.lora import Lora
from vessel.model.network import Network, NetworkConfig
from vessel.model.sa2va import Sa2VA, Sa2VAConfig
from vessel.paths import expanded
from vessel.runs.manifest import EXPORT_MANIFEST, LOCAL, MANIFEST, Manifest
from vessel.weights.architecture import read_sizes, read_template
from vessel.weights.build import NetworkPlan
from vessel.weights.checks import require_same_base
from vessel.weights.entry import Weights
from vessel.weights.kinds import INTERNVL
from vessel.weights.load import load
from vessel.weights.recognition import open_source
from vessel.weights.report import LoadReport
from vessel.weights.sources import ADAPTER_CONFIG, WeightSource


@dataclass(frozen=True)
class LoadedModel:
    """A trained network and what it needs.

    Attributes:
        network: in evaluation mode, on the CPU, adapters in place when the checkpoint has them.
        prompt: wording that belongs to the network.
        sizes: its shape.
        manifest: of the run, with the threshold and the fingerprint of these weights.
        source: the checkpoint file or folder that was read.
        reports: what each load did, the last one being that of `source`.
        base: sources of the loads before that one.
    """

    network: Network
    prompt: Prompt
    sizes: NetworkConfig
    manifest: Manifest
    source: Path
    reports: tuple[LoadReport, ...]
    base: tuple[Weights, ...]

    @property
    def geometry(self) -> InputGeometry:
        """Cutting that belongs to the network."""
        return self.sizes.geometry

    @property
    def run(self) -> Path | None:
        """Folder of the run that wrote the checkpoint; None for an export or a checkpoint that was moved."""
        run = self.source.parent.parent
        return run if self.source.suffix == ".ckpt" and (run / MANIFEST).is_file() else None

    @property
    def sa2va(self) -> Sa2VA:
        """The network, where `require_language` has let pass."""
        assert isinstance(self.network, Sa2VA)
        return self.network

    @property
    def sa2va_config(self) -> Sa2VAConfig:
        """Its shape, where `require_language` has let pass."""
        assert isinstance(self.sizes, Sa2VAConfig)
        return self.sizes

    def require_language(self, doing: str) -> None:
        """Refuse what only a network with a language model can do.

        Raises:
            VesselError: this one is a baseline.
        """
        if self.network.phrases is not None:
            raise VesselError(
                f"{doing}: {self.manifest.name} is a baseline ({self.manifest.network}) without a language model; only "
                "a Sa2VA can do that"
            )

    @property
    def tuned(self) -> bool:
        """Tell networks that vessel trained from public ones, of which neither phrases nor data are known."""
        return bool(self.manifest.phrases)

    @property
    def threshold(self) -> float:
        """Threshold chosen on validation, 0.5 where none was."""
        return 0.5 if self.manifest.threshold is None else self.manifest.threshold

    @cached_property
    def _chosen(self) -> tuple[Decision, str]:
        """Read decision.json once: a search that ends meanwhile must not part the decision from its source."""
        return read_decision(self.manifest, self.run)

    @property
    def decision(self) -> Decision:
        """From probabilities to masks, as validation chose it for these weights."""
        return self._chosen[0]

    @property
    def decision_source(self) -> str:
        """Describe where the decision comes from, also when the run keeps one that is not for these weights."""
        return self._chosen[1]


def load_model(ckpt: str, settings: LoadSettings | None = None) -> LoadedModel:
    """Read a run folder (its best checkpoint), a checkpoint file, an export, or a public Sa2VA folder or hub id.

    Raises:
        VesselError: nothing there, damaged, of a kind that holds no whole network, or too large for the memory.
    """
    settings = settings or LoadSettings()
    path = expanded(ckpt)
    if path.is_file():
        return _from_checkpoint(path, settings)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        return _from_checkpoint(find_checkpoint(path), settings)
    source = open_source(ckpt)
    if (source.path / EXPORT_MANIFEST).is_file():
        return _from_export(source, settings)
    return _from_public(source, settings)


def _from_checkpoint(path: Path, settings: LoadSettings) -> LoadedModel:
    checkpoint = read_checkpoint(path)
    beside = path.parent.parent / "tokenizer"
    manifest = Manifest.from_dict(checkpoint["vessel"])
    prompt = _prompt(manifest.config, str(beside) if beside.is_dir() else None)
    plan = _plan(manifest, prompt, settings, settings.base or Weights.listed(manifest.config["weights"]))
    network = plan.build()
    require_same_base(manifest.weights, plan.reports)
    source = open_source(str(path))
    report = load(network, source, plan.names, tokens=prompt.new_tokens.start)
    # Frozen parameters come again from where the run began; what it drew at random is nowhere else.
    own = {name for name, parameter in network.named_parameters() if parameter.requires_grad or not plan.weights}
    if absent := sorted(own.difference(report.names("loaded"))):
        raise VesselError(f"{path}: {len(absent)} tensors that only this run has are not there (first: {absent[0]})")
    sweep = checkpoint.get("callbacks", {}).get("ThresholdSweep", {})
    manifest = replace(manifest, threshold=sweep.get("threshold"), fingerprint=report.fingerprint)
    return _loaded_model(network, prompt, plan, manifest, path, report)


def _from_export(source: WeightSource, settings: LoadSettings) -> LoadedModel:
    manifest = Manifest.from_dict(read_json(source.path / EXPORT_MANIFEST))
    prompt = _prompt(manifest.config, str(source.path))
    if source.kind.needs_base:
        base = settings.base or Weights.listed(manifest.config["weights"])
        if not base or any(entry.source == LOCAL for entry in base):
            raise VesselError(
                f"{source.path}: an adapter whose base is not on the hub; name the weights that it was trained on: "
                "network.base=FOLDER"
            )
        plan = _plan(manifest, prompt, settings, [*base, source.entry])
    else:
        plain = replace(manifest, config={**manifest.config, "trainable": "nothing"})
        plan = _plan(plain, prompt, settings, [source.entry], lora=Lora(r=0))
    network = plan.build()
    *before, own = plan.reports
    if source.kind.needs_base:
        require_same_base(manifest.weights, before)
    if own.fingerprint != manifest.fingerprint:
        raise VesselError(
            f"{source.path}: its tensors (fingerprint {own.fingerprint}) are not those that were exported "
            f"({manifest.fingerprint}); a file is missing or was changed, export again"
        )
    return _loaded_model(network, prompt, plan, manifest, source.path)


def _from_public(source: WeightSource, settings: LoadSettings) -> LoadedModel:
    """A network that vessel never trained: nothing but its own files says what it is."""
    if source.kind.needs_base or source.kind is INTERNVL or "grounding" not in source.kind.modules:
        raise VesselError(
            f"{source.entry.source}: a {source.kind.name} is no whole Sa2VA; begin a training with it: vessel.train "
            f"weights=[...,{source.entry.source}]"
        )
    prompt = Prompt(str(source.path), read_template(source.config))
    if not prompt.has_seg:
        raise VesselError(
            f"{source.path}: its tokenizer has no [SEG], so it is not that of a Sa2VA; copy the right one"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in source.outline().items()}
    sizes = read_sizes(source.config, shapes, grounding=settings.grounding)
    plan = NetworkPlan(
        sizes, prompt.token_ids, prompt.new_tokens, trainable="nothing", weights=[source.entry],
        frozen_dtype=settings.dtype, compile=settings.compile,
    )  # fmt: skip
    _check_memory(plan)
    manifest = Manifest(
        name=source.path.name if source.revision is None else source.entry.source,
        config={"weights": [source.entry.source]}, data={}, phrases=(), prompt=prompt.name,
    )  # fmt: skip
    return _loaded_model(plan.build(), prompt, plan, manifest, source.path)


def _loaded_model(
    network: Network, prompt: Prompt, plan: NetworkPlan, manifest: Manifest, source: Path, *reports: LoadReport
) -> LoadedModel:
    told = (*plan.reports, *reports)
    known = manifest if manifest.fingerprint else replace(manifest, fingerprint=told[-1].fingerprint)
    return LoadedModel(network.eval(), prompt, plan.sizes, known, source, told, tuple(plan.weights)[: len(told) - 1])


def _prompt(config: Mapping[str, Any], tokenizer: str | None) -> Prompt:
    node = OmegaConf.create(config["prompt"])
    if tokenizer is not None:
        node.tokenizer = tokenizer
    return instantiate(node)


def _plan(
    manifest: Manifest, prompt: Prompt, settings: LoadSettings, weights: Sequence[Weights], *, lora: Lora | None = None
) -> NetworkPlan:
    fields = {} if lora is None else {"lora": lora}
    plan = NetworkPlan.from_config(
        manifest.config,
        tokens=prompt.token_ids,
        new_tokens=prompt.new_tokens,
        phrases=manifest.phrases,
        weights=weights,
        frozen_dtype=settings.dtype,
        compile=settings.compile,
        **fields,
    )
    _check_memory(plan)
    return plan


def _check_memory(plan: NetworkPlan) -> None:
    """Refuse to read what cannot fit, before reading it."""
    needed, free = plan.nbytes(), psutil.virtual_memory().available
    if needed > free:
        smaller = (
            ""
            if plan.frozen_dtype == torch.bfloat16
            else "; dtype=bf16 needs half of it (network.dtype of predict and evaluate)"
        )
        raise VesselError(
            f"the network needs {readable(needed)} of memory as {str(plan.frozen_dtype).removeprefix('torch.')} and "
            f"{readable(free)} are free{smaller}"
        )
