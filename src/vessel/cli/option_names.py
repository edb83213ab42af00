"""Answer old names of options with the new ones, before Hydra reports that it could not override them."""

from __future__ import annotations

from collections.abc import Sequence

from vessel.errors import VesselError
from vessel.runs.old_names import present_option


def answer_old_names(argv: Sequence[str], command: str) -> None:
    """Refuse an option, or a value of it, that has another name today.

    Args:
        argv: the words after the command.
        command: such as `train`.

    Raises:
        VesselError: names the option of today.
    """
    for word in argv:
        new = word if word.startswith("-") else present_option(word, command)
        if new != word:
            name = new.lstrip("+~").partition("=")[0]
            raise VesselError(f"{word}: this option is now called {name}; type {new}")
