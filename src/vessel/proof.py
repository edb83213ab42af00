"""The proof of an export: a fresh process loads the folder and its masks are compared with the training network's.

`python -m vessel.proof FOLDER IMAGES.npz PROBABILITIES.npz` is that process; `vessel.export` starts it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vessel.errors import VesselError, told_to_the_user

Maps = dict[str, NDArray[np.float32]]
FP32_TOLERANCE = 1e-4
AGREEMENT = 0.999
UNDECIDED = 0.05


def masks_of(ckpt: str, images: Mapping[str, NDArray[np.uint8]]) -> Maps:
    """What `ckpt` says about images, in float32 on the CPU.

    Args:
        ckpt: a run, a checkpoint or an export.
        images: uint8 [H, W, 3] by name.

    Returns:
        float32 [K, H, W] by name, in the order of the phrases it was trained on.
    """
    from vessel.batch import Sample
    from vessel.data.dataset import make_sample
    from vessel.data.inputs import Target
    from vessel.inference import Failure, Predictor
    from vessel.restore import restore

    restored = restore(ckpt)
    targets = [Target(name, Path(name), name) for name in images]

    def load(index: int) -> Sample:
        image = images[targets[index].name]
        return make_sample(image, restored.manifest.phrases, restored.prompt, restored.views)

    maps: Maps = {}
    for answer in Predictor(restored, device="cpu").predict(targets, load, batch_size=1):
        if isinstance(answer, Failure):
            raise VesselError(f"sample {answer.file}: {answer.reason}")
        maps[answer.target.id] = np.stack([one.numpy() for one in answer.probabilities if one is not None])
    return maps


def masks_in_a_fresh_process(folder: Path, images: Mapping[str, NDArray[np.uint8]]) -> Maps:
    """As `masks_of`, in a new interpreter that knows nothing but the folder.

    Raises:
        VesselError: the process failed; with the last line it said.
    """
    with tempfile.TemporaryDirectory() as temporary:
        asked, answered = Path(temporary) / "images.npz", Path(temporary) / "probabilities.npz"
        np.savez(asked, *images.values())
        command = [sys.executable, "-m", "vessel.proof", str(folder), str(asked), str(answered)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise VesselError(f"the export does not load in a fresh process: {last}")
        with np.load(answered) as file:
            return {name: file[f"arr_{index}"] for index, name in enumerate(images)}


def compare(expected: Maps, found: Maps, *, threshold: float, dtype: str) -> str:
    """Compare an export's probabilities with the training network's.

    fp32 allows a difference of 1e-4. bf16 wants 99.9 % of the mask pixels equal; pixels whose probability lies within
    0.05 of the threshold do not count there, since a rounding of any kind sends them to either side.

    Args:
        expected: of the training network.
        found: of the export.
        threshold: at which masks are compared.
        dtype: `fp32` or `bf16`.

    Returns:
        what was measured, a sentence.

    Raises:
        VesselError: naming the sample that differs.
    """
    differences, equal = [], []
    for name, maps in expected.items():
        same = (maps > threshold) == (found[name] > threshold)
        decided = np.abs(maps - threshold) > UNDECIDED
        differences.append(float(np.abs(maps - found[name]).max()))
        equal.append(float(same.mean()))
        if differences[-1] > FP32_TOLERANCE if dtype == "fp32" else same[decided].sum() < AGREEMENT * decided.sum():
            raise VesselError(
                f"sample {name}: the export's probabilities differ from the training network's by up to "
                f"{differences[-1]:.2g}, and {1 - equal[-1]:.3%} of its mask pixels change"
                + (": too much for bf16, export with dtype=fp32" if dtype != "fp32" else "")
            )
    return (
        f"{len(expected)} images in a fresh process: {min(equal):.3%} of mask pixels equal, "
        f"probabilities differ by at most {max(differences):.2g}"
    )


def drawn_image(side: int = 256) -> NDArray[np.uint8]:
    """A bright ring on a dark gradient, for where no image of the run is at hand: uint8 [side, side, 3]."""
    y, x = np.mgrid[:side, :side] / side
    radius = np.hypot(x - 0.45, y - 0.55)
    grey = 40 * x + 30 * y + 160 * np.exp(-(((radius - 0.28) / 0.04) ** 2))
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def main() -> None:
    """The fresh process."""
    with told_to_the_user():
        folder, asked, answered = sys.argv[1:]
        with np.load(asked) as file:
            images = {name: file[name] for name in file.files}
        np.savez(answered, *masks_of(folder, images).values())


if __name__ == "__main__":
    main()
