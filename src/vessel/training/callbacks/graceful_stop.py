"""Stop a run that is asked to, at the end of an optimizer step, with a checkpoint to go on from."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from typing_extensions import override

from vessel.batch import Batch
from vessel.paths import hydra_option
from vessel.processes.signals import STOP_CODES
from vessel.training.callbacks.last_checkpoint import LastCheckpoint


class GracefulStop(Callback):
    """SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, a first Ctrl-C: all ranks save `last` after the same step and leave.

    A second Ctrl-C ends the process at once. During validation the run stops between two batches; the run that goes on
    begins with that validation, see `vessel.training.resume`. It is called after all that log, see
    `vessel.training.callbacks.order`, as nothing else of the step is called any more.
    """

    def __init__(self) -> None:
        self._asked = 0  # number of the signal
        self._step = 0
        self._before: dict[int, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep out Lightning's own handlers: they broadcast inside a signal handler, and requeue jobs of SLURM."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on; before, a signal ends the process, as there is nothing to save."""
        self._before = {signum: signal.signal(signum, self._ask) for signum in STOP_CODES}
        # Before a progress bar takes them over, which is called later.
        sys.stdout, sys.stderr = _Terminal(sys.stdout), _Terminal(sys.stderr)
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Look after each optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if signum := self._agreed(trainer):
            trainer._logger_connector.on_batch_end()  # else the numbers of this step would be lost
            trainer._logger_connector.update_train_step_metrics()
            self._leave(trainer, signum)

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Look after each batch, as a validation may take longer than a scheduler waits."""
        if signum := self._agreed(trainer):
            self._leave(trainer, signum)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave even now: the jobs of a sweep that would follow were to be stopped as well."""
        if signum := self._agreed(trainer):
            self._leave(trainer, signum)
        self._restore()
        if self._asked:  # while ranks agreed
            raise SystemExit(STOP_CODES[signal.Signals(self._asked)])

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """On the way out of a stop, the signals that torchrun sends to stragglers are still only noted."""
        if not isinstance(exception, SystemExit):
            self._restore()

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = self._asked or signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if signum == signal.SIGHUP:
            _let_go_of_the_terminal()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
        for name in ("stdout", "stderr"):
            if isinstance(stream := getattr(sys, name), _Terminal):
                setattr(sys, name, stream.stream)

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any rank was sent, the highest where they differ; 0 for none."""
        if not trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False):
            return 0
        asked = torch.tensor(self._asked, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(asked, reduce_op="max"))

    def _leave(self, trainer: Trainer, signum: int) -> None:
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, LastCheckpoint)]
        saved = "no callbacks.last_checkpoint, so nothing was saved"
        going_on = hydra_option("resume", Path(trainer.default_root_dir))
        for saver in savers[:1]:
            saved = f"saved {os.path.relpath(saver.save(trainer))}; go on with: python -m vessel.train {going_on}"
        if trainer.is_global_zero:
            line = f"\nstopped by {signal.Signals(signum).name} after step {trainer.global_step}: {saved}"
            Console().print(line, soft_wrap=True, markup=False, highlight=False)
        raise SystemExit(STOP_CODES[signal.Signals(signum)])


class _Terminal:
    """A text stream whose terminal may be closed while it is written to, before the signal of that is handled."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """As the stream does; what a closed terminal no longer takes is lost."""
        with _while_it_is_open():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As `write`."""
        with _while_it_is_open():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _while_it_is_open() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        _let_go_of_the_terminal()


def _let_go_of_the_terminal() -> None:
    """It was closed: whatever is written to it from now on would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # a closed terminal is none for isatty
            os.dup2(nowhere, stream)
    os.close(nowhere)
