"""`python -m vessel.prepare source=FOLDER|HUB_ID|synthetic out=DIR [split=patient|block|frame] [folds=5]`.

Turns images with masks into a data set that train, evaluate and predict read. Options: `--help`.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.cli.composition import report_composition_errors
from vessel.cli.conf import CONF
from vessel.cli.exits import report_errors
from vessel.cli.values import check_values
from vessel.errors import VesselError


@hydra.main(version_base="1.3", config_path=CONF, config_name="prepare")
def app(cfg: DictConfig) -> None:
    """Read the options and prepare."""
    with report_errors():
        check_values(cfg, "prepare")
        from vessel.cli.options import typed
        from vessel.data.preparation import PrepareOptions, prepare

        options = typed(cfg, PrepareOptions, "vessel.prepare")
        try:
            prepare(options)
        except OSError as error:  # no permission, no space: the system's message names the path
            raise VesselError(f"{error}; nothing was written") from error


def main() -> None:
    """Compose the configuration and prepare."""
    with report_composition_errors("prepare"):
        app()


if __name__ == "__main__":
    main()
