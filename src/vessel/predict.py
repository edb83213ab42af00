"""`python -m vessel.predict ckpt=… images=FILE|FOLDER|DATASET phrases=[a,b] out=DIR`: masks for images.

Options: `--help`.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.conf_path import CONF
from vessel.errors import told_to_the_user


@hydra.main(version_base="1.3", config_path=CONF, config_name="predict")
def main(cfg: DictConfig) -> None:
    """Read the options and predict."""
    with told_to_the_user():
        from vessel.options import require_given, typed
        from vessel.prediction_request import check

        require_given(cfg, "vessel.predict")
        check(cfg)
        # Heavy from here on: a mistake that needs none of it is told before.
        from vessel.prediction import Options, predict

        predict(typed(cfg, Options, "vessel.predict"))


if __name__ == "__main__":
    main()
