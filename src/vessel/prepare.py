"""`python -m vessel.prepare source=FOLDER|HUB_ID|synthetic out=DIR [split=patient|block|frame] [folds=5]`.

Turns images with masks into a data set that train, evaluate and predict read. Options: `--help`.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.conf_path import CONF
from vessel.errors import VesselError, told_to_the_user


@hydra.main(version_base="1.3", config_path=CONF, config_name="prepare")
def main(cfg: DictConfig) -> None:
    """Read the options and prepare."""
    with told_to_the_user():
        from vessel.data.preparation import Options, prepare
        from vessel.options import typed

        options = typed(cfg, Options, "vessel.prepare")
        try:
            prepare(options)
        except OSError as error:  # no permission, no space: the system's words name the place
            raise VesselError(f"{error}; nothing was written") from error


if __name__ == "__main__":
    main()
