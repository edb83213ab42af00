"""The recorded networks beside a developer's checkout, and what the public code computed with them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from vessel.inference.loading import LoadedModel, load_model
from vessel.inference.options import LoadSettings
from vessel.model.grounding import GroundingConfig

NETWORKS = ("sa2va_qwen2", "sa2va_internlm2")
# The public code has SAM2's sizes in its source, so no file of these folders states them.
GROUNDING = GroundingConfig(
    embed_dim=16, heads=1, stages=(1, 2, 2, 1), global_blocks=(4,), width=64, memory_width=16, memory_layers=2,
    memory_mlp=128,
)  # fmt: skip


@dataclass(frozen=True)
class Golden:
    """A recorded network, restored, with its cases.

    Attributes:
        folder: the Sa2VA folder.
        restored: what vessel makes of it.
        cases: by name, as expected.json lists them.
        tensors: of expected.safetensors.
    """

    folder: Path
    restored: LoadedModel
    cases: dict[str, dict]
    tensors: dict[str, torch.Tensor]

    def image(self, name: str) -> np.ndarray:
        """A picture of the case, uint8 [H, W, 3]."""
        return np.array(Image.open(self.folder / "images" / f"{name}.png").convert("RGB"))

    def mask(self, case: str) -> np.ndarray:
        """bool [frames, H, W]."""
        width = self.cases[case]["mask_shape"][-1]
        return np.unpackbits(self.tensors[f"{case}.mask"].numpy(), axis=-1)[..., :width].astype(bool)


def open_golden(folder: Path) -> Golden:
    expected = json.loads((folder / "expected.json").read_text())["cases"]
    restored = load_model(str(folder), LoadSettings(grounding=GROUNDING))
    return Golden(
        folder, restored, {case["name"]: case for case in expected}, load_file(folder / "expected.safetensors")
    )
