"""Options of `vessel.predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vessel.inference.decision import CleanupOptions
from vessel.inference.options import NetworkOptions
from vessel.paths import expanded


@dataclass
class PredictOptions:
    """The options of the command; conf/predict.yaml has the defaults, `--help` the explanations."""

    ckpt: str
    images: str
    out: str
    phrases: Any
    question: str | None
    mask_prompts: str | None
    video: bool
    split: str | None
    decode: str
    max_new_tokens: int
    decision: str | None
    threshold: Any
    hysteresis: Any
    cleanup: CleanupOptions
    tta: Any
    overwrite: bool
    batch_size: int
    workers: int
    device: str
    devices: int
    network: NetworkOptions

    @property
    def target(self) -> Path:
        """Folder of the results."""
        return expanded(self.out)
