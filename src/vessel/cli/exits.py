"""Turn errors that a user can fix into one message and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from vessel.errors import user_message


class JobFailedError(CompactHydraException):
    """A job of a sweep that failed and whose message is printed; Hydra shows this kind without a traceback."""


@contextmanager
def report_errors() -> Iterator[None]:
    """Print a `VesselError`, also one wrapped by Hydra's instantiate, as one message and exit with status 1."""
    try:
        yield
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        _end_the_job(message)


def _end_the_job(message: str) -> NoReturn:
    # In a sweep the other jobs go on, for which Hydra needs an exception.
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise JobFailedError(message) from None
    raise SystemExit(1) from None
