"""Shares of a job in processes of their own: real ones, which import nothing heavy."""

import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partial

import psutil
import pytest
from tests.launching import ROOT, SEARCH_PATH, wait_for
from tests.processes.pool_works import begin, broken_begin, die, refuse, wait_long, work

from vessel.errors import VesselError
from vessel.processes.pool import in_processes


def alive(pid):
    """Runs; one that has ended may wait for its status to be asked."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_results_come_in_order_and_nobody_goes_on_before_the_place_is_made(tmp_path):
    results = in_processes([partial(work, tmp_path, number=number) for number in range(3)], partial(begin, tmp_path))
    assert [result[0] for result in results] == [0, 1, 2]
    assert len({result[1] for result in results} | {os.getpid()}) == 4
    assert [result[2:] for result in results] == [(False, True)] * 3


def test_a_single_share_needs_no_process(tmp_path):
    alone = in_processes([partial(work, tmp_path, number=7)], partial(begin, tmp_path))
    assert alone == [(7, os.getpid(), False, True)]


@pytest.mark.parametrize(
    ("bad", "first", "message"),
    [
        (refuse, begin, "a.png: torn; mend it"),
        (die, begin, "died without a word"),
        (work, broken_begin, "make the place"),
    ],
    ids=["refused", "killed", "no place"],
)
def test_one_that_fails_ends_the_others_at_once(tmp_path, bad, first, message):
    other = work if first is broken_begin else wait_long
    with pytest.raises(VesselError, match=message):
        in_processes([partial(other, tmp_path), partial(bad, tmp_path)], partial(first, tmp_path))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_none_outlives_the_command(tmp_path, signum):
    """The signal goes to the parent alone, as from a scheduler or `kill`."""
    code = f"from pathlib import Path; from tests.processes.pool_works import many; many(Path({str(tmp_path)!r}))"
    env = {**os.environ, "PYTHONPATH": SEARCH_PATH}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stderr=subprocess.DEVNULL) as parent:
        assert wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2, seconds=60)
        parent.send_signal(signum)
        assert parent.wait(30) != 0
    pids = [int(file.stem) for file in tmp_path.glob("*.pid")]
    assert wait_for(lambda: not any(map(alive, pids)), seconds=10)
