"""What the processes of test_shares.py do; a module of its own, since each of them imports it."""

import os
import signal
import time
from functools import partial

from vessel.errors import BadItemsError, Problem, VesselError
from vessel.processes.pool import in_processes


def begin(folder):
    (folder / "place").mkdir()


def broken_begin(folder):
    raise VesselError("who could make the place?")


def work(folder, ready, number=0):
    """Says who worked, and whether the place was made before and after `ready`."""
    before = (folder / "place").exists()
    ready()
    return number, os.getpid(), before, (folder / "place").exists()


def refuse(folder, ready):
    raise BadItemsError("images", [Problem("a.png", "torn", "mend it")])


def die(folder, ready):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_long(folder, ready):
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(600)


def many(folder):
    in_processes([partial(wait_long, folder)] * 2, partial(begin, folder))
