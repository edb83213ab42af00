"""The ranks of a training run: started by torchrun where nobody has yet, signalled, waited for, and their end told.

A rank that dies takes the others with it: torchrun's agent looks ten times a second, asks the others to end and kills
them after 30 seconds. A rank that only stands still is noticed when the `timeout` of the strategy is over.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vessel.errors import VesselError
from vessel.paths import hydra_quoted
from vessel.processes import signals
from vessel.processes.ranks import PARENT, RANKS, Rank, device_count, this_rank, told_by_rank
from vessel.processes.signals import REQUEUE, STOP_CODES
from vessel.runs.manifest import read_result
from vessel.runs.record import noted

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

GRACE = 30  # seconds that torchrun's agent gives ranks to end, when one has failed, before it kills them


def launch(config: DictConfig, train: Callable[[DictConfig], float | None]) -> float | None:
    """Train as configured, in as many processes as the configuration asks for.

    Args:
        config: of the run.
        train: trains in one process, which may be one of several ranks; returns the best validation score.

    Returns:
        the best value of the monitored validation metric; None when nothing was validated.

    Raises:
        VesselError: bad input, or what a rank said before it failed.
        SystemExit: a signal stopped the run; the status is 128 and the signal's number, 0 for a job that was requeued.
    """
    rank = this_rank()
    requeuing = [signal.getsignal(signum) for signum, code in STOP_CODES.items() if code == REQUEUE]
    try:
        wanted = 1 if config.plan else device_count(config.trainer.devices, config.trainer.accelerator)
        nodes = 1 if config.plan else int(config.trainer.num_nodes)
        if rank.of > 1 and rank.of != wanted * nodes:
            raise VesselError(
                f"{rank.started_by} started {rank.of} ranks, but trainer.devices={config.trainer.devices} on "
                f"trainer.num_nodes={nodes} makes {wanted * nodes}; give both as they were started"
            )
        if rank.of == 1 and nodes > 1:
            raise VesselError(
                f"trainer.num_nodes={nodes}: start it with srun, or on every node with torchrun --nnodes={nodes} "
                f"--node-rank=0 (1, ...) --master-addr=HOST --master-port=29500 --nproc-per-node={wanted}"
                " -m vessel.train ..."
            )
        run, in_charge = Path(config.run), not (config.plan or rank.index or PARENT in os.environ)
        with _alone_in(run) if in_charge else nullcontext(), noted(config, run) if in_charge else nullcontext():
            if rank.of == 1 and wanted > 1:
                return _in_ranks(config, wanted)
            return _in_this_process(config, rank, train)
    except SystemExit as stop:
        if stop.code == REQUEUE and PARENT not in os.environ:
            _requeue(requeuing, rank)
        raise


@contextmanager
def _alone_in(run: Path) -> Iterator[None]:
    """Keep a second process out of a run, as `resume=auto` would otherwise take one that still trains."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise VesselError(
                    f"{run}: another process is training there; wait for its end, or leave out resume= for a new run"
                ) from None
            print(f"warning: {run}: this file system has no locks ({error.strerror}); start no second process there")
        yield


def _in_this_process(config: DictConfig, rank: Rank, train: Callable[[DictConfig], float | None]) -> float | None:
    if rank.of == 1:
        return train(config)
    with told_by_rank(rank, Path(config.run)):
        return train(config)


def _in_ranks(config: DictConfig, count: int) -> float | None:
    run = Path(config.run).absolute()
    (run / RANKS).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run / RANKS / "config.yaml")
    command = (
        *("-m", "vessel.train", "--config-path", str(run / RANKS), "--config-name", "config"),
        *(f"hydra.run.dir={hydra_quoted(run)}", "hydra.output_subdir=null"),
    )
    with _environment(count), _Forwarding() as forwarding:
        failures = _torchrun(count, command)
    if forwarding.killed:
        raise SystemExit(STOP_CODES[signal.SIGINT])
    if failures:
        _tell(failures, run)
    result = read_result(run)
    return result["best"] if result is not None else None


@contextmanager
def _environment(count: int) -> Iterator[None]:
    """Variables that the ranks inherit; a later job of a sweep has its own."""
    threads = max(1, (os.cpu_count() or 1) // count)
    given = {PARENT: str(os.getpid()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    before = {key: os.environ.get(key) for key in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


class _Forwarding:
    """Pass signals on to the ranks, which save and leave; the second Ctrl-C ends them at once.

    torchrun's agent would give them 30 seconds to save and then kill them, so it gets none of these signals.
    """

    def __init__(self) -> None:
        self.interrupted = self.killed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Forwarding:
        self._before = {signum: signal.signal(signum, self._forward) for signum in STOP_CODES}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        ranks = list(_children())
        if not ranks:  # torchrun has not started them yet
            raise SystemExit(STOP_CODES[signal.Signals(signum)])
        self.killed = self.interrupted and signum == signal.SIGINT
        self.interrupted |= signum == signal.SIGINT
        for pid in ranks:
            os.kill(pid, signal.SIGKILL if self.killed else signum)


def _children() -> Iterator[int]:
    """Ranks that this process has started and that still run."""
    import psutil

    for child in psutil.Process().children():
        try:
            if "vessel.train" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                yield child.pid
        except psutil.Error:  # it has just ended
            continue


def _torchrun(count: int, command: tuple[str, ...]) -> Mapping[int, ProcessFailure]:
    """Start ranks and wait for them. What failed, by rank."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `_tell` says it
    with tempfile.TemporaryDirectory(prefix="vessel_ranks_") as notes:  # what ranks noted of their errors
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            logs_specs=DefaultLogsSpecs(log_dir=notes),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            signals_to_handle="SIGQUIT",
        )
        try:
            elastic_launch(settings, sys.executable)(*command)
        except ChildFailedError as error:
            return error.failures
        except SignalException as stopped:
            raise SystemExit(128 + stopped.sigval) from None
    return {}


def _tell(failures: Mapping[int, ProcessFailure], run: Path) -> None:
    """End as the rank that failed first ended; the others only lost it, or were asked to end."""
    first = min(_order(failure)[1] for failure in failures.values())
    stuck = [i for i, f in failures.items() if f.exitcode == -signal.SIGKILL and f.timestamp - first > GRACE / 2]
    index, failure = min(((i, f) for i, f in failures.items() if i not in stuck), key=lambda item: _order(item[1]))
    note, code, log = failure.error_file_data, failure.exitcode, _log(run, index)
    if "told" in note:
        text = str(note["message"]["message"])
        if note["told"]:
            raise VesselError(f"rank {index}: {text}")
        if note["echo"]:
            log += "".join(f"; rank {i} stood still and had to be killed{_log(run, i)}" for i in stuck)
        else:
            print(text, file=sys.stderr)
        raise VesselError(f"rank {index}: {text.rstrip().rpartition(chr(10))[2]}{log}")
    if _stopped(code):
        raise SystemExit(code if code > 0 else 128 - code)
    if code < 0:
        hint = "a library failed; the lines above may say which"
        if -code == signal.SIGKILL:
            hint = "most often memory ran out: fewer data.workers or a smaller data.batch_size need less, see plan=true"
        raise VesselError(f"rank {index} was killed (signal {-code}, {signal.Signals(-code).name}): {hint}{log}")
    raise VesselError(f"rank {index} ended with status {code}{log}")


def _order(failure: ProcessFailure) -> tuple[int, float]:
    """Order failures: an error of its own before an echo before an end that was asked for, then by time (Unix)."""
    note = failure.error_file_data
    if "told" in note:
        return (1 if note["echo"] else 0), float(note["time"])
    # A killed rank is seen at the next look only, when others may have noted their own end already.
    return (2 if _stopped(failure.exitcode) else 0), failure.timestamp - 1.0


def _stopped(code: int) -> bool:
    """Tell whether a rank ended as a signal asked it to."""
    return code in STOP_CODES.values() or -code in STOP_CODES


def _log(run: Path, index: int) -> str:
    file = run / RANKS / f"{index}.log"
    return f"; its output: {os.path.relpath(file)}" if file.is_file() and file.stat().st_size else ""


def _requeue(handlers: list[Any], rank: Rank) -> None:
    """Have the scheduler start the job again, which then goes on in its folder.

    Args:
        handlers: of the signals that ask for it, before vessel's: the scheduler's own tool, such as submitit, first.
        rank: the first one asks; all end with status 0.
    """
    for handler in handlers:
        if isinstance(handler, Callable) and getattr(handler, "__module__", "") != signals.__name__:  # type: ignore[arg-type]
            handler(signal.SIGUSR1, None)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if rank.index == 0:
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"error: job {job} was not requeued ({error}); submit it again with resume=auto", file=sys.stderr)
            return
    raise SystemExit(0)
