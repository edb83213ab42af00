"""Stop a run on a signal, at the end of an optimizer step, with a checkpoint to resume from."""

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
    """A stop by SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or a first Ctrl-C: all ranks save `last` after one step, then exit.

    A second Ctrl-C ends the process at once. During validation the run stops between two batches; the resumed run
    begins with that validation, see `vessel.training.resume`. This callback is called after all that log, see
    `vessel.training.callbacks.order`, as nothing else of the step is called any more.
    """

    def __init__(self) -> None:
        self._signal = 0  # number of the first signal received; 0 for none
        self._step = 0
        self._before: dict[int, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep out Lightning's own handlers: they broadcast inside a signal handler, and requeue jobs of SLURM."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals from here on; before, one ends the process, as there is nothing to save."""
        self._before = {signum: signal.signal(signum, self._receive) for signum in STOP_CODES}
        # Before a progress bar takes them over, which is called later.
        sys.stdout, sys.stderr = _Terminal(sys.stdout), _Terminal(sys.stderr)
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Stop after an optimizer step if a signal came."""
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
        """Stop after a batch if a signal came, as a validation may take longer than a scheduler waits."""
        if signum := self._agreed(trainer):
            self._leave(trainer, signum)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exit even now if a signal came: it was to stop the following jobs of a sweep as well."""
        if signum := self._agreed(trainer):
            self._leave(trainer, signum)
        self._restore_handlers()
        if self._signal:  # it came while ranks agreed
            raise SystemExit(STOP_CODES[signal.Signals(self._signal)])

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the handlers, except on the way out of a stop, in which torchrun signals ranks that are not done."""
        if not isinstance(exception, SystemExit):
            self._restore_handlers()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if signum == signal.SIGHUP:
            _detach_from_terminal()

    def _restore_handlers(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
        for name in ("stdout", "stderr"):
            if isinstance(stream := getattr(sys, name), _Terminal):
                setattr(sys, name, stream.stream)

    def _agreed(self, trainer: Trainer) -> int:
        """Return the signal that any rank received, the highest where they differ; 0 for none."""
        if not trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            return 0
        received = torch.tensor(self._signal, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

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
        """Write as the stream does; text that a closed terminal no longer takes is lost."""
        with _while_it_is_open():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as the stream does, see `write`."""
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
        _detach_from_terminal()


def _detach_from_terminal() -> None:
    """Write to /dev/null instead of a terminal that was closed, where every write would fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # a closed terminal is none for isatty
            os.dup2(null, stream)
    os.close(null)
