"""Commands in processes of their own that need not import everything again.

A server process imports the heavy libraries once and forks itself for each command: it then runs as under `python -m`,
with its own arguments, folder, environment, session and output. What a start itself does (imports, `--help`, signals
before training) is tested with real starts, see `tests.launching.started`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Not wandb, whose folder for media is made by the import and removed at the end of the first process.
MODULES = (
    "torch", "torchvision", "transformers", "peft", "lightning.pytorch", "torchmetrics", "monai.metrics", "skimage",
    "hydra", "matplotlib.figure", "albumentations", "vessel.training.run", "vessel.training.task",
    "vessel.evaluation.command", "vessel.prediction.command", "vessel.publishing.command", "vessel.data.preparation",
    "vessel.model.sa2va", "vessel.feature_cache.callback", "vessel.processes.launch", "vessel.cli.argv",
)  # fmt: skip
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


class Forked:
    """A command that runs; of the interface of `subprocess.Popen` what tests use.

    Args:
        command: `-m`, a module and its arguments, or a script and its arguments.
        cwd: its folder.
        env: its environment.
        apart: keep its errors apart from its output.
    """

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], apart: bool = False) -> None:
        self.args = list(command)
        self._folder = tempfile.TemporaryDirectory(prefix="vessel_output_")
        files = [str(Path(self._folder.name) / name) for name in (("out", "err") if apart else ("out", "out"))]
        for file in files:
            Path(file).touch()
        self._process = _CONTEXT.Process(target=_run, args=(self.args, str(cwd), dict(env), files))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its status, minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end, then read what it printed."""
        self.wait(timeout)
        return self.output(), None

    def output(self, name: str = "out") -> str:
        """What it has printed until now; `err` for errors that are kept apart."""
        return (Path(self._folder.name) / name).read_text(encoding="utf-8", errors="replace")

    def send_signal(self, signum: int) -> None:
        """Signal it alone."""
        os.kill(self.pid, signum)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Forget its output."""
        self._folder.cleanup()


def run_on_ranks(
    ranks: int, script: str, *arguments: str, cwd: Path, env: Mapping[str, str], seconds: float
) -> tuple[int, str]:
    """Run a script on so many ranks, as torchrun starts them: one that fails ends the others.

    Returns:
        status of the first that failed, else 0, and what all of them printed.
    """
    port = _free_port()
    family = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": f"test-{port}"}
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    running = [
        Forked([script, *arguments], cwd=cwd, env={**env, **family, **sizes, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(ranks)
    ]
    try:
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in running) and time.monotonic() < end:
            if any(process.poll() for process in running):
                break
            time.sleep(0.02)
        failed = next((process.returncode for process in running if process.returncode), 0)
        late = time.monotonic() >= end
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait(30)
        output = "".join(process.output() for process in running)
        return (failed or (1 if late else 0)), output
    finally:
        for process in running:
            process.close()


def _free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _run(command: list[str], cwd: str, env: dict[str, str], files: Sequence[str]) -> None:
    """Become the command; the process is a fresh fork of the server."""
    import atexit

    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in ((1, files[0]), (2, files[1])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8", buffering=1)  # noqa: SIM115
    try:
        if command[0] == "-m":
            sys.argv = [command[1], *command[2:]]
            sys.path.insert(0, cwd)
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command)
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
