"""Complete the command line of `vessel.train` before Hydra reads it: one run folder for all ranks, and `resume=`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vessel.cli.conf import CONF
from vessel.cli.option_names import answer_old_names
from vessel.errors import VesselError
from vessel.paths import expanded, hydra_option, hydra_quoted
from vessel.processes.ranks import PARENT, STAMP, agree_on_stamp, die_with_parent, this_rank
from vessel.runs.record import SETTINGS, checkpoints_of, config_dir_of, differing, options_of, settings_of

_QUIET = ("hydra.output_subdir=null", "hydra/job_logging=stdout")


def complete_argv() -> None:
    """Add the run's folder to `sys.argv`, and the stamp that all ranks have to agree on to the environment.

    Raises:
        VesselError: an option has another name today, `resume=` names no run or contradicts another option, or torchrun
            or srun started a sweep.
    """
    rank = this_rank()
    if rank.index:
        # Rank 0 writes the log file and the configuration.
        _insert(*_QUIET)
    if PARENT in os.environ:
        die_with_parent()
        return
    answer_old_names(sys.argv[1:], "train")
    given = _parse()
    if given.help or given.hydra_help or given.cfg or given.info or given.shell_completion:
        return
    if (_value("plan", given.overrides) or "").lower() == "true":
        _insert("hydra.run.dir=.", *_QUIET)  # it makes no run
        return
    if rank.of > 1:
        if given.multirun:
            raise VesselError(f"-m starts the ranks of its jobs itself, job after job; leave {rank.started_by} out")
        os.environ.setdefault(STAMP, agree_on_stamp(rank))
    try:
        _complete_resume(given)
    except (HydraException, OmegaConfBaseException):
        return  # Hydra will meet the same mistake, and reports it without a traceback


def _complete_resume(given: Namespace) -> None:
    typed = _value("resume", given.overrides)
    # A run that is named brings options of its own, without which those given now need not be right.
    resume = _compose(given)[0].get("resume") if typed in (None, "null", "auto") else _unquoted(typed)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if resume is None and requeued and typed is None:
        _insert("resume=auto")
        resume = "auto"
    if resume is None:
        return
    has_folder = _value("hydra.run.dir", given.overrides) is not None
    if resume != "auto" and (has_folder or given.multirun):
        raise VesselError(
            f"resume={resume} names the one folder of a run that is resumed: leave out "
            f"{'-m' if given.multirun else 'hydra.run.dir='}, or give resume=auto"
        )
    if given.multirun and _value("hydra.sweep.dir", given.overrides) is None:
        _print_once(
            "resume=auto: each job is resumed in its own folder only; to resume a sweep name its folder, "
            "hydra.sweep.dir=outputs/<name>/sweep_<time>"
        )
    if given.multirun or has_folder:
        return
    run = _find_newest(given) if resume == "auto" else _open_named(str(resume), given)
    if run is not None:
        _insert(f"hydra.run.dir={hydra_quoted(run)}")
        _insert("hydra.output_subdir=null")  # these settings may yet be refused; see `vessel.runs.record.noted`


def _insert(*overrides: str, first: bool = False) -> None:
    """Insert overrides beside those given, as Hydra's parser takes them in one row only."""
    given = _parse().overrides
    index = len(sys.argv)
    if given:
        index = sys.argv.index(given[0]) if first else sys.argv.index(given[-1]) + 1
    sys.argv[index:index] = overrides


def _parse() -> Namespace:
    from hydra._internal.utils import get_args_parser  # the very parser of hydra.main

    return get_args_parser().parse_args()


def _value(key: str, overrides: Sequence[str]) -> str | None:
    values = [value for name, _, value in (o.partition("=") for o in overrides) if name.lstrip("+") == key]
    return values[-1] if values else None


def _unquoted(value: str | None) -> str:
    """Return a value without the quotes that Hydra takes away."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    element = OverridesParser.create().parse_rule(value or "", "element")
    return str(getattr(element, "text", element))


def _open_named(resume: str, given: Namespace) -> Path:
    """Return the run that was named, and insert its own options before those given now."""
    run = expanded(resume)
    if not (run / SETTINGS).is_file():
        raise VesselError(
            f"resume={resume}: no folder of a run; give outputs/<name>/<time>, or resume=auto. To begin a new run with "
            "a checkpoint, use ckpt="
        )
    try:
        before, own = settings_of(run), options_of(run)
    except VesselError as error:
        raise VesselError(
            f"{error}; give the whole command of that run, with resume=auto hydra.run.dir={hydra_quoted(run)}"
        ) from error
    named = {_key(override) for override in given.overrides}
    kept = [o for o in own if _key(o) not in named and _key(o) != "resume"]
    _insert(*kept, first=True)
    given.overrides = kept + given.overrides
    if given.config_dir is None and (found := config_dir_of(run)) is not None:
        sys.argv += ["--config-dir", found]
        given.config_dir = found
    if others := differing(before, _compose(given)[0]):
        _print_once(f"resume={resume}: it is resumed with other settings than it had: {', '.join(others)}")
    return run


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _find_newest(given: Namespace) -> Path | None:
    """Find, of the runs with these settings, the newest with a checkpoint, else the newest; None without any."""
    settings, folder = _compose(given)
    empty, other = None, ""
    for file in sorted(folder.parent.glob(f"*/{SETTINGS}"), key=lambda file: file.stat().st_mtime, reverse=True):
        run = file.parents[1]
        path = os.path.relpath(run)
        try:
            others = differing(settings_of(run), settings)
        except VesselError as error:
            _print_once(f"resume=auto: {path} is skipped: {error}")
            continue
        if others:
            reason = f"{path}, has other settings: {', '.join(others)}; to resume it all the same:"
            other = other or f"the newest, {reason} {hydra_option('resume', run)}"
        elif checkpoints_of(run):
            _print_once(f"resume=auto: goes on in {path}")
            return run
        else:
            empty = empty or run
    if empty is not None:
        _print_once(f"resume=auto: starts again in {os.path.relpath(empty)}, which has no checkpoint")
    elif other:
        _print_once(f"resume=auto: a new run begins; {other}")
    return empty


def _compose(given: Namespace) -> tuple[dict[str, Any], Path]:
    """Compose the configuration, interpolations kept, and return it with the folder that the run would have.

    Of a sweep: the settings that its jobs have in common.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = list(given.overrides)
    if given.multirun:
        parsed = OverridesParser.create().parse_overrides(overrides)
        overrides = [o.input_line or "" for o in parsed if not o.is_sweep_override()]
    if given.config_dir:
        overrides.append(f"hydra.searchpath=[{hydra_quoted('file://' + os.path.abspath(given.config_dir))}]")
    with initialize_config_dir(os.path.abspath(given.config_path or CONF), version_base="1.3"):
        config = compose(given.config_name or "train", overrides, return_hydra_config=True)
    folder = Path(config.hydra.run.dir)
    plain: Any = OmegaConf.to_container(config, resolve=False)
    plain.pop("hydra")
    return plain, folder


def _print_once(line: str) -> None:
    """Print a line on the first rank only."""
    if this_rank().index == 0:
        print(line, flush=True)
