"""`vessel.train` in processes of its own, of which none may be left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from tests.conftest import TINY_NETWORK
from tests.forked import Forked, run_on_ranks

ROOT = Path(__file__).parents[1]
SEARCH_PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of processes that tests start
TRAIN = ("-m", "vessel.train")
TWO_RANKS = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
SHORT = (
    "experiment=tiny", "data.phrases=[lumen]", "data.workers=0", "trainer.max_steps=4", "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1", "~callbacks.mask_panels", "~callbacks.progress", "~callbacks.parameter_table",
    *TINY_NETWORK,
)  # fmt: skip
COMMANDS = {("-m", f"vessel.{verb}") for verb in ("prepare", "train", "evaluate", "predict", "export")}
PATIENCE = 240  # seconds; a run takes ten on an idle machine


@contextmanager
def started(*command: str, cwd: Path, env: Mapping[str, str] | None = None):
    """A process in a session of its own, with its output in one pipe; at the end it and all it started are gone.

    A command of vessel is forked by a server that has the libraries already, anything else is really started.
    """
    environment = {**_environment(), **(env or {})}
    if command[:2] in COMMANDS:
        process = Forked(command, cwd=cwd, env=environment)
    else:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for left in [*of_folder(cwd), process.pid]:
            if psutil.pid_exists(left):
                os.kill(left, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        if isinstance(process, Forked):
            process.close()


def _environment() -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "VESSEL_", "TORCHELASTIC_"))}
    return {**ours, "PYTHONPATH": SEARCH_PATH, "OMP_NUM_THREADS": "1"}


def run(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Status and output of a command that has to end by itself, leaving no process behind."""
    with started(*command, cwd=cwd, env=env) as process:
        output = process.communicate(timeout=PATIENCE)[0]
        assert wait_for(lambda: not of_folder(cwd), seconds=10), "a process is left behind"
        return process.returncode, output


def command(*arguments: str, cwd: Path | str = ".", timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run `python -m vessel....` to its end in a folder; its output and its errors are kept apart.

    Args:
        arguments: the module, such as `vessel.prepare`, and its options.
        cwd: where it runs; the current folder by default.
        timeout: seconds until it counts as hanging.
    """
    process = Forked(["-m", *arguments], cwd=Path(cwd).absolute(), env=_environment(), apart=True)
    try:
        process.wait(timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, process.output(), process.output("err"))
    finally:
        if process.poll() is None:
            process.kill()
        process.close()


def on_ranks(ranks: int, script: str, *arguments: str, cwd: Path) -> tuple[int, str]:
    """Status and output of a Python program on several ranks, as torchrun starts them."""
    return run_on_ranks(ranks, script, *arguments, cwd=cwd, env=_environment(), seconds=PATIENCE)


def of_folder(cwd: Path) -> list[int]:
    """Processes that work in a folder, those that have ended but were not yet asked for their status excepted."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(cwd.resolve()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def wait_for(true: Callable[[], object], *, seconds: float = PATIENCE) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def under_way(name: str, cwd: Path, step: int) -> Callable[[], bool]:
    """Whether a run has logged a step."""
    return lambda: any(f'"step": {step},' in file.read_text() for file in cwd.glob(f"outputs/{name}/*/metrics.jsonl"))
