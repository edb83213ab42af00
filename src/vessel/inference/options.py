"""Options of a network that is loaded: precision, device, base, compilation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vessel.errors import VesselError
from vessel.model.grounding import GroundingConfig
from vessel.weights.entry import Weights
from vessel.weights.export import DTYPES


@dataclass(frozen=True)
class LoadSettings:
    """The settings for loading a network.

    Attributes:
        dtype: of parameters that a run did not train.
        base: for an adapter folder whose base is not on the hub: the weights it was trained on.
        grounding: sizes of SAM2, for a public folder whose SAM2 is none of the four public ones.
        compile: have torch compile what takes most of the time.
    """

    dtype: torch.dtype = torch.float32
    base: Sequence[Weights] = ()
    grounding: GroundingConfig | None = None
    compile: bool = False


@dataclass
class NetworkOptions:
    """The options `network.*` of evaluate and predict, whose `--help` explains each."""

    dtype: str
    device_map: Any
    base: Any
    grounding: Any
    compile: bool = False

    def load_settings(self, device: torch.device) -> LoadSettings:
        """Return the settings for a device; `auto` is bf16 on a GPU, as the public code, and fp32 on a CPU.

        Raises:
            VesselError: an unknown dtype or size.
        """
        dtypes = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32} | DTYPES
        if self.dtype not in dtypes:
            raise VesselError(f"network.dtype={self.dtype}: choose one of {', '.join(dtypes)}")
        try:
            grounding = None if self.grounding is None else GroundingConfig(**self.grounding)
        except TypeError as error:
            known = ", ".join(GroundingConfig.__dataclass_fields__)
            raise VesselError(f"network.grounding={self.grounding}: {error}; the sizes are {known}") from error
        return LoadSettings(dtypes[self.dtype], Weights.listed(self.base), grounding, self.compile)


def choose_device(device: str) -> torch.device:
    """The device named, or with `auto` a GPU when there is one.

    Raises:
        VesselError: unknown, or a GPU where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise VesselError(f"device={device}: choose one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise VesselError("device=cuda: torch finds no GPU here; use device=auto or device=cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
