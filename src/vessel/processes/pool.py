"""Shares of one job, a process each: all of them succeed, or the job fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from typing import TypeVar

from vessel.errors import VesselError, user_message

T = TypeVar("T")
Work = Callable[[Callable[[], object]], T]  # called with `ready`


def in_processes(works: Sequence[Work[T]], begin: Callable[[], None]) -> list[T]:
    """Do each work in a process of its own, or a single one in this process.

    Whatever ends this call early, an error, Ctrl-C or the death of this process, ends the others too. A
    `ProcessPoolExecutor` may overlook a process that dies before its first result, and then waits for ever.

    Args:
        works: each calls the `ready` that it is given before it writes; that returns when all of them are ready.
        begin: called once, before the first `ready` returns. It and the works can be pickled.

    Returns:
        what each work returned, in order.

    Raises:
        VesselError: what a work raised as such, or that a process died.
        RuntimeError: the traceback of any other error.
    """
    if len(works) == 1:
        return [works[0](begin)]
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    barrier = context.Barrier(len(works), begin)
    children = []
    readers: dict[Connection, int] = {}
    try:
        for index, work in enumerate(works):
            reader, writer = context.Pipe(duplex=False)
            child = context.Process(target=_run, args=(work, barrier, writer))
            child.start()
            children.append(child)
            writer.close()  # so that the end of the child is the end of what can be read
            readers[reader] = index
        return _received(readers)
    except BaseException:
        for child in children:
            child.kill()
        raise
    finally:
        for child in children:
            child.join()


def _received(readers: dict[Connection, int]) -> list[T]:
    of = len(readers)
    results: dict[int, T] = {}
    while readers:
        for reader in wait(list(readers)):
            assert isinstance(reader, Connection)
            try:
                result, error = reader.recv()
            except EOFError as end:
                raise VesselError(
                    f"one of {of} processes died without a word, as they do when the memory is short, and nothing is "
                    "whole; try fewer at once"
                ) from end
            if error is not None:
                raise error
            results[readers.pop(reader)] = result
    return [results[index] for index in range(of)]


def _run(work: Work[T], barrier: Barrier, results: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all at once; the parent ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        results.send((work(partial(_ready, barrier)), None))
    except Exception as error:
        message = user_message(error)
        results.send((None, RuntimeError(traceback.format_exc()) if message is None else VesselError(message)))


def _ready(barrier: Barrier) -> None:
    try:
        barrier.wait()
    except threading.BrokenBarrierError:
        threading.Event().wait()  # `begin` failed in another process, which says why: the parent ends this one


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
