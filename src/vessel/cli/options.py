"""Read the options of a command into the dataclass that lists them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vessel.cli.conf import CONF
from vessel.errors import VesselError

T = TypeVar("T")


def require_given(config: DictConfig, command: str) -> None:
    """Refuse options that a command does not know or lacks, before anything heavy is imported to read the rest.

    Args:
        config: as Hydra composed it.
        command: such as `vessel.predict`, for its configuration file and the message.

    Raises:
        VesselError: an option is unknown or missing.
    """
    known = OmegaConf.load(Path(CONF) / f"{command.removeprefix('vessel.')}.yaml")
    if unknown := sorted(set(config) - set(known)):
        raise VesselError(f"{unknown[0]}= is no option; `python -m {command} --help` lists them")
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise VesselError(_missing(missing[0], command))


def typed(config: DictConfig, schema: type[T], command: str) -> T:
    """Read the options into an object of `schema`, a dataclass.

    Args:
        config: as Hydra composed it.
        schema: names and types of the options; the configuration file has the defaults.
        command: such as `vessel.predict`, for the message.

    Raises:
        VesselError: an option is missing, unknown or of another type.
    """
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
    except MissingMandatoryValue as error:
        raise VesselError(_missing(error.full_key, command)) from error
    except OmegaConfBaseException as error:
        raise VesselError(str(error)) from error
    assert isinstance(options, schema), "the schema decides the type"
    return options


def _missing(key: str | None, command: str) -> str:
    return f"{key}= is missing; `python -m {command} --help` explains it"
