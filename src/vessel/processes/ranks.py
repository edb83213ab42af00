"""The processes of one training run: which of them this is, what it may write, and how its end is told."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vessel.errors import user_message

PARENT = "VESSEL_PARENT"  # the vessel.train that started this rank and waits for it
STAMP = "VESSEL_STAMP"  # last part of the run's folder, where several processes have to agree on it
RANKS = "ranks"  # folder in a run: the configuration of the ranks, and what ranks other than 0 print

# What a rank says when another one has gone: no cause, only its echo.
_ECHO = re.compile(r"gloo/|NCCL|connection (?:closed|reset) by (?:remote )?peer", re.IGNORECASE)


@dataclass(frozen=True)
class Rank:
    """This process among those of its run.

    Attributes:
        index: 0 writes what a run has once.
        of: how many there are.
        started_by: `vessel`, `torchrun` or `srun`; empty for a process on its own.
    """

    index: int = 0
    of: int = 1
    started_by: str = ""


def this_rank() -> Rank:
    """Read from what torchrun and srun set."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return Rank(int(env["RANK"]), int(env["WORLD_SIZE"]), "vessel" if PARENT in env else "torchrun")
    tasks = int(env.get("SLURM_NTASKS", "1"))
    if tasks > 1 and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):  # those have tasks, but no srun
        return Rank(int(env["SLURM_PROCID"]), tasks, "srun")
    return Rank()


def device_count(devices: Any, accelerator: str) -> int:
    """Count the devices of this node that a trainer takes, as Lightning does.

    Args:
        devices: `trainer.devices`: a number, a list, such a list as text, `auto` or -1.
        accelerator: `trainer.accelerator`.
    """
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if str(devices) not in ("auto", "-1"):
        return int(devices)
    if accelerator not in ("auto", "gpu", "cuda"):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def die_with_parent() -> None:
    """Have the kernel end this rank when the process that started it was killed; on Linux only."""
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != int(os.environ[PARENT]):  # it died before
            os._exit(1)


def agree_on_stamp(rank: Rank) -> str:
    """The last part of the run's folder, the same on every rank that torchrun or srun started."""
    env = os.environ
    if rank.started_by == "srun":
        return f"slurm_{env['SLURM_JOB_ID']}_{env.get('SLURM_STEP_ID', '0')}"
    from torch.distributed import TCPStore

    store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    if rank.index == 0:
        store.set(STAMP, time.strftime("%Y-%m-%d_%H-%M-%S"))
    return store.get(STAMP).decode()


@contextmanager
def told_by_rank(rank: Rank, run: Path) -> Iterator[None]:
    """Run one of several ranks: ranks other than 0 print into `ranks/<rank>.log`, and an error ends the process.

    The error is noted where torchrun and `vessel.processes.launch` look for it. Nothing else of the process is
    waited for: it may be in an operation that the ranks share and that will never end.
    """
    out, err = os.dup(1), os.dup(2)
    if rank.index:
        _print_to(run / RANKS / f"{rank.index}.log")
    try:
        yield
    except Exception as error:
        message = user_message(error)
        text = message or "".join(traceback.format_exception(error))
        echo = message is None and isinstance(error, RuntimeError) and bool(_ECHO.search(str(error)))
        if echo:
            text = f"waited in vain for another rank ({_last_line(text)})"
        _note(text, told=message is not None, echo=echo)
        _flush()
        if rank.started_by == "vessel":
            os._exit(1)
        os.dup2(err, 2)
        print(f"error: rank {rank.index}: {text}" if message or echo else text, file=sys.stderr, flush=True)
        os._exit(1)
    finally:
        _flush()
        os.dup2(out, 1)
        os.dup2(err, 2)


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _print_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.close(opened)


def _note(text: str, *, told: bool, echo: bool) -> None:
    """Write the file of torchrun's errors, in its layout, with facts of ours beside."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        note = {"message": {"message": text, "extraInfo": extra}, "told": told, "echo": echo, "time": time.time()}
        Path(file).write_text(json.dumps(note), encoding="utf-8")
