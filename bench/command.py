"""Run the commands of vessel, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def vessel(folder: Path, verb: str, *options: str, threads: int | None = None) -> None:
    """Run `python -m vessel.<verb>` in a folder; where it fails, print its errors and exit.

    Args:
        folder: where it runs.
        verb: such as `train`.
        options: as on the command line.
        threads: of each process; None for what it takes by itself.
    """
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, "-m", f"vessel.{verb}", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench: vessel.{verb} failed\n{done.stderr}")
