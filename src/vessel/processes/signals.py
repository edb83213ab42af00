"""Signals that stop a run, and the exit status of each."""

from __future__ import annotations

import multiprocessing
import signal
from types import FrameType

REQUEUE = 138
STOP_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: REQUEUE, signal.SIGUSR2: REQUEUE}
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
    STOP_CODES[signal.SIGHUP] = 129


def leave_on_signals() -> None:
    """Until training begins there is nothing to save: the signals that stop a run end the process at once."""
    for signum in STOP_CODES:
        signal.signal(signum, _leave)


def _leave(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait for Python
    raise SystemExit(STOP_CODES[signal.Signals(signum)])


def outlive_signals() -> None:
    """For a loader's worker: Ctrl-C and schedulers signal it too, and the step could not be ended without it."""
    for signum in STOP_CODES:
        signal.signal(signum, signal.SIG_IGN)


def end_workers() -> None:
    """At the end of the main process: its workers ignore the SIGTERM that Python would send them and wait for."""
    for worker in multiprocessing.active_children():
        worker.kill()
