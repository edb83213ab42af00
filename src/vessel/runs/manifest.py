"""A run and what it leaves behind: the manifest, found again from a run folder, a checkpoint or an export."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vessel.errors import VesselError
from vessel.files import write_json
from vessel.runs.old_names import present_config, present_report

MANIFEST = "manifest.json"
RESULT = "result.json"
_SIZES = {"vessel.model.baselines.PromptedSam2Config": "sam2_prompt", "vessel.model.baselines.UNetConfig": "unet"}
LOCAL = "(a local folder)"  # what stands for a place of this machine in whatever leaves it

EXPORT_MANIFEST = "vessel.json"


@dataclass(frozen=True)
class Manifest:
    """The record that it takes to understand, or repeat, what made some weights. Plain JSON values only.

    Attributes:
        name: of the run.
        config: the resolved configuration.
        data: name, fingerprint, split hash, split unit and note of the data set, and its counts.
        phrases: what the network was trained to segment, in order.
        prompt: chat template.
        weights: one load report per source the network started from.
        parent: fingerprint and name of the run whose checkpoint this run started from.
        threshold: probability above which a pixel is vessel, chosen on validation; None before the first validation.
        decision: everything else that was chosen on validation with it, as `vessel.inference.decision.Decision`
            writes it; of an export, None where nothing was searched.
        fingerprint: of the weights, as `vessel.weights.digests` gives it; empty in the manifest of a run.
        created: UTC time.
        versions: of Python and the packages that matter.
    """

    name: str
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    phrases: tuple[str, ...]
    prompt: str
    weights: tuple[Mapping[str, Any], ...] = ()
    parent: Mapping[str, Any] | None = None
    threshold: float | None = None
    decision: Mapping[str, Any] | None = None
    fingerprint: str = ""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    @property
    def network(self) -> str:
        """Return the kind of network: `sa2va`, or a baseline, `sam2_prompt` or `unet`."""
        return _SIZES.get(str((self.config.get("model") or {}).get("_target_")), "sa2va")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and for a checkpoint read with `weights_only=True`."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """The inverse of `as_dict`.

        Raises:
            VesselError: these are not the values of a manifest.
        """
        stated = values if isinstance(values, Mapping) else {}
        lacking = sorted({"name", "config", "data", "phrases", "prompt", "weights"} - stated.keys())
        unknown = sorted(stated.keys() - cls.__dataclass_fields__.keys())
        wrong = [name for name in ("config", "data") if not isinstance(stated.get(name, {}), Mapping)]
        wrong += [name for name in ("phrases", "weights") if not isinstance(stated.get(name, ()), list | tuple)]
        told = {"it lacks": lacking, "it has an unknown": unknown, "of another type is": wrong}
        if faults := [f"{what} {', '.join(names)}" for what, names in told.items() if names]:
            raise VesselError(
                f"the manifest of these weights (vessel.json of an export, `vessel` in a checkpoint) is none that this "
                f"vessel reads: {'; '.join(faults)}; copy it again, or use the version of vessel that wrote it"
            )
        config = present_config(stated["config"])
        lists = {"phrases": tuple(stated["phrases"]), "weights": tuple(map(present_report, stated["weights"]))}
        return cls(**{**stated, "config": config, **lists})

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        write_json(folder / MANIFEST, self.as_dict())


def read_result(run: Path) -> dict[str, Any] | None:
    """Read what a run left that came to its end; None for one that did not."""
    file = run / RESULT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def write_result(run: Path, result: Mapping[str, Any]) -> None:
    """Note that a run came to its end: `best`, its best monitored value, and `limits`, where that end was set."""
    write_json(run / RESULT, result, indent=None)


def without_places(value: Any) -> Any:
    """Plain values with every local folder or file replaced: its name may be a person's."""
    if isinstance(value, Mapping):
        return {key: without_places(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(part) for part in value]
    if isinstance(value, str):
        is_place = value.startswith((os.sep, "~", ".")) or (os.sep in value and Path(value).exists())
        return LOCAL if is_place else value
    return value


def _versions() -> dict[str, str]:
    packages = ("vessel", "torch", "lightning", "transformers", "peft", "sam2")
    return {"python": platform.python_version()} | {p: version(p) for p in packages}
