"""Options of a command: read against the dataclass that lists them."""

from __future__ import annotations

from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vessel.errors import VesselError

T = TypeVar("T")


def typed(config: DictConfig, schema: type[T], command: str) -> T:
    """Options as an object of `schema`, a dataclass.

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
        raise VesselError(f"{error.full_key}= is missing; `python -m {command} --help` explains it") from error
    except OmegaConfBaseException as error:
        raise VesselError(str(error)) from error
    assert isinstance(options, schema), "the schema decides the type"
    return options
