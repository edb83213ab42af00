"""Kill training at random moments and see it go on: `python -m tests.faults [ENGINE=KILLS ...] [seed=N]`, which is
`make test-faults`. It prints a table and ends with status 1 when anything was lost.

Each engine trains once undisturbed. Then it trains again under SIGKILL, every rank at once, and is started anew by the
same command with `resume=auto`, until its kills are used up and the last run has come to its end. Checkpoints are
written at every second step, so that kills meet writing as often as computing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random

import psutil
from rich.console import Console
from rich.table import Table
from tests.conftest import TINY_NETWORK

from vessel.checkpoints.reading import find_defect, find_newest_intact, list_checkpoints

RANKS = ("trainer.accelerator=cpu", "trainer.devices=2")
ENGINES = {
    "one": ("trainer=cpu",),
    "ddp": ("trainer=ddp", *RANKS),
    "zero3": ("trainer=zero3", "trainer.precision=32-true", *RANKS),
}
KILLS = {"one": 30, "ddp": 10, "zero3": 10}
STEPS = 30
PATIENCE = 240  # seconds without a new step that count as a hang
SETTINGS = (
    "experiment=tiny", "data.root=data", "data.phrases=[lumen]", "data.batch_size=1", "data.workers=1",
    "trainer.accumulate_grad_batches=2", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=7",
    "trainer.log_every_n_steps=1", "+callbacks.last_checkpoint.every_n_train_steps=2", "~callbacks.mask_panels",
    "loss=sa2va", *TINY_NETWORK,
)  # fmt: skip


@dataclass
class Tally:
    """What came of the kills of one engine.

    Attributes:
        kills: processes killed, all ranks at once.
        resumed: of those, how many were followed by a start that had a good checkpoint to go on from.
        anew: followed by a start that had none yet.
        lost: a checkpoint that was good before a kill, with neither itself nor a newer one good after it.
        half_written: checkpoints under their own name that are not good.
        hangs: processes that made no step for `PATIENCE` seconds.
        wrong: steps of a finished run whose loss is not that of the undisturbed one, or missing, to the last bit; and
            starts whose first step is not the one after their checkpoint.
        runs: runs that came to their end under these kills.
    """

    kills: int = 0
    resumed: int = 0
    anew: int = 0
    lost: int = 0
    half_written: int = 0
    hangs: int = 0
    wrong: int = 0
    runs: int = 0

    @property
    def holds(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.lost or self.half_written or self.hangs or self.wrong) and self.runs > 0


class Engine:
    """One way of training, in a folder that holds a data set in `data`.

    Args:
        folder: where the runs are made.
        name: in `ENGINES`.
        draw: of the moments.
    """

    def __init__(self, folder: Path, name: str, draw: Random) -> None:
        self.folder, self.name, self.draw = folder, name, draw
        self.tally = Tally()
        self._after_kill = False
        self._expected = (0, 0)  # lines written before the last start, and the step that it was to begin with

    def torture(self, kills: int) -> Tally:
        """Train undisturbed, then under that many kills."""
        undisturbed = self._finish(f"{self.name}_undisturbed")
        assert sorted(undisturbed) == list(range(STEPS)), f"the undisturbed run made the steps {sorted(undisturbed)}"
        while self.tally.kills < kills or self._after_kill or self.tally.runs == 0:
            name = f"{self.name}_{self.tally.runs}"
            if self.tally.kills < kills and self._killed(name):
                continue
            losses = self._finish(name)
            self.tally.wrong += sum(losses.get(step) != loss for step, loss in undisturbed.items())
            self.tally.runs += 1
        return self.tally

    def _killed(self, name: str) -> bool:
        """Start or go on, and kill at a random moment; False where it ended before."""
        process, seen = self._start(name), len(self._steps(name))
        early = self.draw.random() < 0.15
        if not early:
            self._wait(process, lambda: len(self._steps(name)) > seen)
        until = time.monotonic() + self.draw.uniform(0, 12 if early else 2.5)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        if process.poll() is not None:
            return False
        good, step = self._good(name)
        _kill(process)
        self.tally.kills += 1
        self._after_kill = True
        after, step_after = self._good(name)
        self.tally.lost += good is not None and (after is None or step_after < step)
        self.tally.half_written += sum(find_defect(path) is not None for path in self._checkpoints(name))
        return True

    def _finish(self, name: str) -> dict[int, float]:
        """Let it come to its end: its losses by step."""
        process = self._start(name)
        self._wait(process, lambda: False)
        if process.returncode != 0:
            told = (self.folder / "log").read_text(errors="replace")
            raise SystemExit(f"{self.name}: the run ended with {process.returncode}\n{told[-4000:]}")
        self._check_start(name)
        return {int(record["step"]): record["train/loss"] for record in self._losses(name)}

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        self._check_start(name)
        good, step = self._good(name)
        if self._after_kill:
            self.tally.resumed += good is not None
            self.tally.anew += good is None
        self._after_kill, self._expected = False, (len(self._steps(name)), max(step, 0))
        command = [sys.executable, "-m", "vessel.train", *SETTINGS, *ENGINES[self.name], f"name={name}", "resume=auto"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, process: subprocess.Popen[bytes], done) -> None:
        """Until it has ended, or `done`; a process that no longer makes steps is counted and killed."""
        lines, since = 0, time.monotonic()
        while process.poll() is None and not done():
            time.sleep(0.02)
            if (now := sum(1 for _ in self._records())) != lines:
                lines, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                self.tally.hangs += 1
                _kill(process)

    def _check_start(self, name: str) -> None:
        """See that the start before went on where its checkpoint was."""
        seen, step = self._expected
        if new := self._steps(name)[seen:]:
            self.tally.wrong += new[0] != step
        self._expected = (len(self._steps(name)), 0)

    def _records(self, name: str = "*") -> Iterator[dict[str, float]]:
        for file in self.folder.glob(f"outputs/{name}/*/metrics.jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue  # half a line, as a kill leaves it

    def _losses(self, name: str) -> list[dict[str, float]]:
        return [record for record in self._records(name) if "train/loss" in record]

    def _steps(self, name: str) -> list[int]:
        return [int(record["step"]) for record in self._losses(name)]

    def _checkpoints(self, name: str) -> list[Path]:
        return [path for run in self.folder.glob(f"outputs/{name}/*/checkpoints") for path in list_checkpoints(run)]

    def _good(self, name: str) -> tuple[Path | None, int]:
        """The checkpoint that a run would go on from, and its step."""
        runs = sorted(self.folder.glob(f"outputs/{name}/*"))
        found = find_newest_intact(runs[-1])[0] if runs else None
        return found, -1 if found is None else int(found.stem.rpartition("-")[2])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it and every process it started, as a machine that fails does: at once, without a last word."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    process.wait()


def paint(folder: Path) -> None:
    """A data set of five patients in `data`."""
    settings = ["source=synthetic", "out=data", "synthetic.patients=5", "synthetic.frames=4", "synthetic.size=64"]
    subprocess.run([sys.executable, "-m", "vessel.prepare", *settings], cwd=folder, check=True, capture_output=True)


def table_of(tallies: dict[str, Tally]) -> Table:
    """A row for each engine."""
    table = Table(title="kills and what came of them")
    for column in ("engine", *(field.name.replace("_", "-") for field in fields(Tally))):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for engine, tally in tallies.items():
        table.add_row(engine, *(str(getattr(tally, field.name)) for field in fields(Tally)))
    return table


def main(arguments: Sequence[str]) -> int:
    """Do it all; 0 when nothing went wrong."""
    given = {key: int(value) for key, _, value in (argument.partition("=") for argument in arguments)}
    seed = given.pop("seed", int(time.time()))
    kills, tallies, began = given or KILLS, {}, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paint(folder)
        for number, (engine, count) in enumerate(kills.items()):
            tallies[engine] = Engine(folder, engine, Random(seed + number)).torture(count)
            Console().print(table_of(tallies))
    print(f"seed={seed}; {time.monotonic() - began:.0f} s")
    return 0 if all(tally.holds for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
