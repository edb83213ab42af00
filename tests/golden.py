"""Two networks of random weights, and what the public code computed with them: `recordings/parity/README.md`."""

import json
import lzma
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file

from vessel.inference.loading import LoadedModel, load_model
from vessel.inference.options import LoadSettings
from vessel.model.grounding import GroundingConfig

RECORDINGS = Path(__file__).parent / "recordings/parity"
QWEN2, INTERNLM2 = NETWORKS = ("sa2va_qwen2", "sa2va_internlm2")
# SAM2 of the second network is too large for the repository: its masks and its pullback lie beside a checkout.
INTERNLM2_WHOLE = f"shared/golden/{INTERNLM2}"
WITH_MASKS = (QWEN2, INTERNLM2_WHOLE)
IMAGES = {
    QWEN2: ("square", "wide", "small_gray"),
    INTERNLM2: ("square", "small_gray"),
    INTERNLM2_WHOLE: ("square", "wide", "small_gray"),
}
# The public code has SAM2's sizes in its source, so no file of these folders states them.
GROUNDING = GroundingConfig(
    embed_dim=16, heads=1, stages=(1, 2, 2, 1), global_blocks=(4,), width=64, memory_width=16, memory_layers=2,
    memory_mlp=128,
)  # fmt: skip


def cases_of(*networks: str) -> list[tuple[str, str]]:
    """List network and image case for `parametrize`."""
    return [(network, case) for network in networks for case in IMAGES[network]]


@dataclass(frozen=True)
class Golden:
    """A recorded network, loaded, with its cases.

    Attributes:
        folder: the Sa2VA folder.
        model: the network, loaded by vessel.
        cases: by name, as expected.json lists them.
        tensors: of expected.safetensors.
    """

    folder: Path
    model: LoadedModel
    cases: dict[str, dict]
    tensors: dict[str, torch.Tensor]

    def image(self, name: str) -> np.ndarray:
        """Read an image of a case, uint8 [H, W, 3]."""
        return np.array(Image.open(self.folder / "images" / f"{name}.png").convert("RGB"))

    def mask(self, case: str) -> np.ndarray:
        """Unpack the recorded mask of a case: bool [frames, H, W]."""
        width = self.cases[case]["mask_shape"][-1]
        return np.unpackbits(self.tensors[f"{case}.mask"].numpy(), axis=-1)[..., :width].astype(bool)


def unpack(network: str, folder: Path) -> Path:
    """Write a recording as the Sa2VA folder that it was; InternLM2 gets the SAM2 of the other network."""
    recording = RECORDINGS / network
    (folder / "images").mkdir()
    for file in (*recording.glob("*.json"), *(RECORDINGS / "tokenizer").iterdir()):
        shutil.copyfile(file, folder / file.name)
    for file in (recording / "images").iterdir():
        with Image.open(file) as image:
            image.save(folder / "images" / f"{file.stem}.png", compress_level=1)
    unpacked = lzma.decompress((RECORDINGS / QWEN2 / "model.safetensors.xz").read_bytes())
    if network == QWEN2:
        (folder / "model.safetensors").write_bytes(unpacked)
    else:
        own = load(lzma.decompress((recording / "without_sam2.safetensors.xz").read_bytes()))
        sam2 = {name: tensor for name, tensor in load(unpacked).items() if name.startswith("grounding_encoder.")}
        save_file(own | sam2, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "expected.safetensors").write_bytes(lzma.decompress((recording / "expected.safetensors.xz").read_bytes()))
    return folder


def open_golden(folder: Path) -> Golden:
    """Load the network of a folder, and what the public code computed with it."""
    expected = json.loads((folder / "expected.json").read_text())["cases"]
    model = load_model(str(folder), LoadSettings(grounding=GROUNDING))
    return Golden(folder, model, {case["name"]: case for case in expected}, load_file(folder / "expected.safetensors"))
