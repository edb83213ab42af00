"""`python -m vessel.predict ckpt=… images=FILE|FOLDER|DATASET phrases=[a,b] out=DIR`: masks for images.

Options: `--help`.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from vessel.cli.composition import report_composition_errors
from vessel.cli.conf import CONF
from vessel.cli.exits import report_errors
from vessel.cli.option_names import answer_old_names
from vessel.cli.values import check_values


@hydra.main(version_base="1.3", config_path=CONF, config_name="predict")
def app(cfg: DictConfig) -> None:
    """Read the options and predict."""
    with report_errors():
        check_values(cfg, "predict")
        from vessel.cli.options import require_given, typed
        from vessel.prediction.request import check

        require_given(cfg, "vessel.predict")
        check(cfg)
        # Heavy from here on: a mistake that needs none of it is told before.
        from vessel.prediction.command import predict
        from vessel.prediction.options import PredictOptions

        predict(typed(cfg, PredictOptions, "vessel.predict"))


def main() -> None:
    """Refuse options of old names, then compose the configuration and predict."""
    with report_errors(), report_composition_errors("predict"):
        answer_old_names(sys.argv[1:], "predict")
        app()


if __name__ == "__main__":
    main()
