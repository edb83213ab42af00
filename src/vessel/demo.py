"""python -m vessel.demo [option=value ...]: the five commands on synthetic pullbacks, in minutes on two CPU cores.

Options, if any, go to vessel.train.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path


def main() -> None:
    """Run the commands one after the other; one that fails ends the demo with its message."""
    start = time.monotonic()
    home = Path("outputs/demo") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for command in commands(home, sys.argv[1:]):
        print(f"\n$ {shlex.join(['python', *command])}", flush=True)
        if status := subprocess.run([sys.executable, *command], check=False).returncode:
            raise SystemExit(f"demo: {command[1]} ended with status {status}")
    metrics = json.loads((home / "evaluation/metrics.json").read_text(encoding="utf-8"))
    _print_products(home)
    print(f"demo: test_dice={metrics['summary']['all']['dice']['mean']:.3f} seconds={time.monotonic() - start:.0f}")


def commands(home: Path, options: Sequence[str] = ()) -> tuple[tuple[str, ...], ...]:
    """List the commands as a user would type them after `python`, in order.

    Args:
        home: folder of all outputs.
        options: of the training, beside those of the experiment.
    """
    data, run, export = home / "data", home / "train", home / "export"
    return (
        ("-m", "vessel.prepare", "source=synthetic", f"out={data}"),
        ("-m", "vessel.train", "experiment=demo", f"data.root={data}", f"hydra.run.dir={run}", *options),
        ("-m", "vessel.evaluate", f"ckpt={run}", "split=test", f"out={home / 'evaluation'}"),
        ("-m", "vessel.export", f"ckpt={run}", f"out={export}"),
        ("-m", "vessel.predict", f"ckpt={export}", f"images={data}", "split=test", f"out={home / 'predictions'}"),
    )


def _print_products(home: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(home))
    for product, path in {
        "data set, with a contact sheet of its masks": "data/contact_sheet.png",
        "run: numbers": "train/metrics.jsonl",
        "run: checkpoints": "train/checkpoints",
        "run: panels of image, ground truth and prediction": "train/panels",
        "run: threshold sweep": "train/threshold_sweep",
        "report of the unseen patients": "evaluation/report.html",
        "its numbers": "evaluation/metrics.json",
        "scores of each image": "evaluation/per_image.csv",
        "export, a Hugging Face folder": "export",
        "predictions from the export": "predictions/results.json",
        "overlays": "predictions/overlays",
    }.items():
        assert (home / path).exists(), f"{path} was not made"
        table.add_row(product, path)
    table.show_header = False
    Console().print(table)


if __name__ == "__main__":
    main()
