"""From a probability map to a mask: everything that is chosen on validation, and where the choice is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessel.errors import VesselError
from vessel.files import write_json
from vessel.inference.cleanup import Cleanup
from vessel.inference.tta import check_augmentations
from vessel.paths import expanded
from vessel.runs.manifest import Manifest
from vessel.runs.old_names import present_decision

DECISION_FILE = "decision.json"
AUTO = "auto"


@dataclass(frozen=True)
class Decision:
    """The threshold and post-processing that make a mask of probabilities.

    Attributes:
        threshold: a pixel above it is vessel.
        hysteresis: pixels above it are vessel too where they connect, corners included, to one above `threshold`;
            None for no hysteresis.
        cleanup: of the mask, after the threshold.
        views: of the image whose probabilities are averaged with its own; none: the image alone.
    """

    threshold: float = 0.5
    hysteresis: float | None = None
    cleanup: Cleanup = field(default_factory=Cleanup)
    tta: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not 0 < self.threshold < 1:
            raise VesselError(f"threshold={self.threshold}: use auto, or a number between 0 and 1")
        if self.hysteresis is not None and (
            not _is_number(self.hysteresis) or not 0 < self.hysteresis < self.threshold
        ):
            raise VesselError(
                f"hysteresis={self.hysteresis}: use auto, null for no hysteresis, or a number between 0 and "
                f"the threshold, {self.threshold}"
            )
        check_augmentations(self.tta)

    def __call__(self, probability: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The mask bool [H, W] of probabilities float32 [H, W]."""
        strong = probability > self.threshold
        return self.cleanup(strong if self.hysteresis is None else _connected(probability > self.hysteresis, strong))

    def __str__(self) -> str:
        """In words, for terminals and cards."""
        parts = [f"threshold {self.threshold:.2f}"]
        parts += [] if self.hysteresis is None else [f"hysteresis from {self.hysteresis:.2f}"]
        done = {name: value for name, value in asdict(self.cleanup).items() if value}
        parts += [name.replace("_", " ") + ("" if value is True else f" {value:g} px") for name, value in done.items()]
        parts += [f"mean over the image and {', '.join(self.tta)}"] if self.tta else []
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "tta": list(self.tta)}

    @classmethod
    def from_json(cls, content: Any) -> Decision:
        """The inverse of `to_json`.

        Raises:
            VesselError: these are not the values of a decision.
        """
        try:
            content = present_decision(content)
            return cls(**{**content, "cleanup": Cleanup(**content["cleanup"]), "tta": tuple(content["tta"])})
        except (AttributeError, KeyError, TypeError) as error:
            raise VesselError(f"no decision that this vessel reads: {error}") from error


@dataclass
class CleanupOptions:
    """`cleanup.*` of vessel.predict: a value each, or `auto` for what validation chose."""

    opening: Any = AUTO
    closing: Any = AUTO
    fill_holes: Any = AUTO
    min_size: Any = AUTO

    def __post_init__(self) -> None:
        Cleanup(**self.told)

    @property
    def told(self) -> dict[str, Any]:
        """Return the options that are not left to validation."""
        return {name: value for name, value in vars(self).items() if value != AUTO}


def override_decision(
    chosen: Decision, *, threshold: Any, hysteresis: Any, cleanup: CleanupOptions, tta: Any
) -> Decision:
    """Combine what validation chose with the user's options, which come first.

    A threshold of the user's is taken alone: the hysteresis belongs to the threshold that it was chosen with.

    Raises:
        VesselError: an option that makes no sense; names it.
    """
    if threshold != AUTO:
        chosen = replace(chosen, threshold=_number(threshold), hysteresis=None)
    if hysteresis != AUTO:
        chosen = replace(chosen, hysteresis=None if hysteresis is None else _number(hysteresis))
    if tta != AUTO:
        chosen = replace(chosen, tta=(tta,) if isinstance(tta, str) else tuple(tta or ()))
    return replace(chosen, cleanup=replace(chosen.cleanup, **cleanup.told))


@dataclass(frozen=True)
class StoredDecision:
    """The content of decision.json.

    Attributes:
        fingerprint: of the weights.
        decision: chosen for them.
        data: fingerprint of the data set.
        split_hash: of its split, whose validation part was looked at.
        fold: whose validation part; None for the fixed split.
        searched: an entry for everything that was tried, with its effect.
    """

    fingerprint: str
    decision: Decision
    data: str
    split_hash: str
    fold: int | None = None
    searched: tuple[Mapping[str, Any], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "decision": self.decision.to_json(), "searched": [dict(one) for one in self.searched]}

    def write(self, file: Path) -> None:
        """Write it whole: a reader finds the old content or the new."""
        write_json(file, self.to_json())

    @classmethod
    def read(cls, file: Path) -> StoredDecision:
        """The inverse of `write`.

        Raises:
            VesselError: not there, or damaged.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            content["decision"] = Decision.from_json(content["decision"])
            return cls(**{**content, "searched": tuple(content["searched"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VesselError(
                f"{file} cannot be read as a decision ({error}); make it anew by vessel.evaluate search=true"
            ) from error

    def mismatch(self, manifest: Manifest, data: Mapping[str, Any] | None = None) -> str | None:
        """Why it is not for the weights of a manifest; None where it is.

        Args:
            manifest: of the weights.
            data: fingerprint and split hash of the data set in use; None takes the one they were trained on.
        """
        if self.fingerprint != manifest.fingerprint:
            return f"it is of other weights ({self.fingerprint}, these are {manifest.fingerprint})"
        known = manifest.data if data is None else data
        if known and (known.get("fingerprint"), known.get("split_hash")) != (self.data, self.split_hash):
            return "it was chosen on another data set or split"
        return None


def read_decision(manifest: Manifest, run: Path | None) -> tuple[Decision, str]:
    """Read what was decided for some weights, and describe where that comes from.

    Args:
        manifest: of the weights, with their fingerprint.
        run: the folder of their run, if it is at hand.

    Raises:
        VesselError: decision.json is damaged.
    """
    passed_over = ""
    if run is not None and (file := run / DECISION_FILE).is_file():
        stored = StoredDecision.read(file)
        mismatch = stored.mismatch(manifest)
        if mismatch is None:
            return stored.decision, "searched on validation"
        passed_over = f"; {DECISION_FILE} of the run is not used: {mismatch}"
    if manifest.decision is not None:
        return Decision.from_json(manifest.decision), "searched on validation, stored with the weights"
    if manifest.threshold is None:
        return Decision(), f"none stored, 0.5 taken{passed_over}"
    return Decision(manifest.threshold), f"chosen on validation, stored with the weights{passed_over}"


def read_given_decision(place: str, manifest: Manifest, data: Mapping[str, Any] | None = None) -> tuple[Decision, str]:
    """A decision that the user names, for weights without a run folder.

    Args:
        place: decision.json, or its folder.
        manifest: of the weights.
        data: as `StoredDecision.mismatch` takes it.

    Raises:
        VesselError: not there, damaged, or not for these weights.
    """
    file = expanded(place) / DECISION_FILE if expanded(place).is_dir() else expanded(place)
    stored = StoredDecision.read(file)
    if mismatch := stored.mismatch(manifest, data):
        raise VesselError(f"decision={place}: {mismatch}; make one for them by vessel.evaluate search=true out=DIR")
    return stored.decision, "searched on validation"


def _connected(weak: NDArray[np.bool_], strong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The components of `weak` that hold a pixel of `strong`.

    Corners connect, as in `Cleanup`: thin vessels run diagonally. scikit-image's `apply_hysteresis_threshold` joins
    edges only.
    """
    from skimage.measure import label

    components = label(weak, connectivity=2)
    holds = np.zeros(components.max() + 1, dtype=bool)
    holds[components[strong]] = True
    holds[0] = False
    return holds[components]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    """A float where it is one; anything else stays and is refused by name."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
