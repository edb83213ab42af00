"""python -m bench.stream [100 1000]: measure the peak memory of vessel.predict on so many frames of 512 x 512.

Trains the tiny network for two steps on synthetic pullbacks, predicts their frames over and over on the CPU, each count
in a fresh process, and reads the highest resident memory of that process. Linux only. Writes outputs/bench/stream.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from bench.command import vessel
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from vessel.cli.conf import CONF
from vessel.cli.options import typed

OUT = Path("outputs/bench")


def main(*counts: str) -> None:
    """Prepare, measure, print and write.

    Args:
        counts: of frames; 100 and 1000 without any.
    """
    with tempfile.TemporaryDirectory() as temporary:
        data, run = Path(temporary) / "data", Path(temporary) / "run"
        write_synthetic = ("synthetic.patients=5", "synthetic.frames=8", "synthetic.size=512")
        vessel(Path(temporary), "prepare", "source=synthetic", f"out={data}", *write_synthetic)
        steps = ("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu")
        vessel(Path(temporary), "train", "experiment=tiny", f"data.root={data}", f"hydra.run.dir={run}", *steps)
        found = [measure(run, data / "images", count)[0] for count in counts or ("100", "1000")]
    grown = found[-1]["peak_bytes"] - found[0]["peak_bytes"]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "stream.json").write_text(json.dumps({"grown_bytes": grown, "counts": found}, indent=1) + "\n")
    table = Table("frames", "peak MB", "results.json, MB", "seconds a frame", title="vessel.predict, tiny, on CPU")
    for counted in found:
        megabytes = [f"{counted[key] / 1e6:.1f}" for key in ("peak_bytes", "results_bytes")]
        table.add_row(str(counted["frames"]), *megabytes, f"{counted['seconds'] / counted['frames']:.3f}")
    Console().print(table)
    print(f"bench: {OUT / 'stream.json'}: {grown / 1e6:.1f} MB more for {found[-1]['frames']} frames")


def measure(run: Path, images: Path, *counts: str) -> list[dict[str, Any]]:
    """Predict in one fresh process.

    Args:
        run: a trained network.
        images: folder of pictures, taken in turn.
        counts: of frames, one prediction each.

    Returns:
        for each: frames, seconds, and bytes: of the highest resident memory so far, and of results.json.
    """
    command = [sys.executable, "-m", "bench.stream", "predict", str(run), str(images), *counts]
    counted = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(counted.splitlines()[-1])


def predict(run: str, images: str, *counts: str) -> None:
    """Predict so many frames each time, and print what `measure` returns."""
    from vessel.prediction.command import predict as predict_images
    from vessel.prediction.options import PredictOptions

    found = []
    pictures = sorted(Path(images).glob("*.png"))
    for count in map(int, counts):
        with tempfile.TemporaryDirectory() as temporary:
            frames, out = Path(temporary) / "frames", Path(temporary) / "out"
            frames.mkdir()
            for number, picture in enumerate(islice(cycle(pictures), count)):
                os.symlink(picture.resolve(), frames / f"{number}.png")
            with initialize_config_dir(CONF, version_base="1.3"):
                given = [f"ckpt={run}", f"images={frames}", f"out={out}", "device=cpu", "workers=0"]
                options = typed(compose("predict", given), PredictOptions, "vessel.predict")
            start = time.perf_counter()
            assert predict_images(options)["n_ok"] == count
            seconds, written = time.perf_counter() - start, (out / "results.json").stat().st_size
        # Not `ru_maxrss`, which begins at that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
        found.append({"frames": count, "seconds": seconds, "peak_bytes": peak, "results_bytes": written})
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["predict"]:
        predict(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
