"""Turn errors of Hydra's composition into one line that names the option and the correction."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vessel.cli.conf import CONF
from vessel.cli.exits import JobFailedError

_NO_SUCH_KEY = re.compile(r"Could not override '(?P<key>[^']+)'")
_NO_SUCH_CHOICE = re.compile(r"Could not find '(?P<group>[^']+)/(?P<choice>[^'/]+)'")
_FULL_ERROR = "HYDRA_FULL_ERROR"


@contextmanager
def report_composition_errors(command: str) -> Iterator[None]:
    """Print an error of the command line as one line and exit with status 1.

    Hydra itself prints several lines, which advise to append with + what was only misspelt. `HYDRA_FULL_ERROR=1` in the
    environment shows the whole traceback instead.

    Args:
        command: such as `train`.
    """
    if os.environ.get(_FULL_ERROR, "0") == "1":
        yield
        return
    os.environ[_FULL_ERROR] = "1"  # else Hydra prints and exits by itself
    try:
        yield
    except (ConfigCompositionException, OverrideParseException) as error:
        print(f"error: {explain(error, command, sys.argv[1:])}", file=sys.stderr)
        raise SystemExit(1) from None
    except JobFailedError:  # its message is printed already
        raise SystemExit(1) from None
    except (CompactHydraException, OmegaConfBaseException) as error:
        text = str(error)
        print(text if text.startswith("error: ") else f"error: {text}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        os.environ.pop(_FULL_ERROR, None)


def explain(error: Exception, command: str, argv: Sequence[str]) -> str:
    """Explain in one line the fault of the command line.

    Args:
        error: what Hydra raised when it read or composed the configuration.
        command: such as `train`.
        argv: the words after the command.
    """
    chain = _messages(error)
    hint = f"`python -m vessel.{command} --help` lists all"
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error.override, hint)
    if isinstance(error, MissingConfigException) and (found := _NO_SUCH_CHOICE.search(chain)):
        group, choice = found["group"], found["choice"]
        known = list(error.options or ())
        meant = _nearest(choice, known)
        return f"{group}={choice}: choose one of {', '.join(known)}{meant}"
    if found := _NO_SUCH_KEY.search(chain):
        key = found["key"].split("@")[0]
        return f"{key}: vessel.{command} has no such option{_nearest(key, _known_options(command, argv, key))}; {hint}"
    return " ".join(chain.split())


def _explain_grammar(override: str, hint: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: write OPTION=VALUE; {hint}"
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    typed = shlex.quote(f"{key}='{quoted}'")
    return (
        f"{override}: characters such as ( ) [ ] {{ }} , = # and quotes have a meaning of their own; where they belong "
        f"to the value, type {typed}"
    )


def _messages(error: BaseException) -> str:
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    return "\n".join(texts)


def _nearest(name: str, known: Sequence[str]) -> str:
    """Suggest a name of the same section, else of any."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not found:
        leaf = name.rpartition(".")[2]
        ends = {each: each.rpartition(".")[2] for each in known}
        close = difflib.get_close_matches(leaf, list(ends.values()), n=1, cutoff=0.75)
        found = [each for each, end in ends.items() if close and end == close[0]][:1]
    return f"; did you mean {found[0]}?" if found else ""


def _known_options(command: str, argv: Sequence[str], wrong: str) -> list[str]:
    """List the options of a command, with those that its other words choose."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    others = [word for word in argv if "=" in word and not word.lstrip("+~").startswith((wrong, "-", "hydra"))]
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        for overrides in (others, [word for word in others if word.startswith("experiment=")], []):
            try:
                config = compose(command, overrides)
            except (CompactHydraException, OmegaConfBaseException):
                continue
            groups = [path.name for path in os.scandir(CONF) if path.is_dir()]
            return sorted({*_keys(OmegaConf.to_container(config, resolve=False)), *groups})
    return []


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(node, dict):
        return
    for name, child in node.items():
        if not str(name).startswith("_"):
            yield f"{prefix}{name}"
            yield from _keys(child, f"{prefix}{name}.")
