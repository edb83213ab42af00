"""`python -m vessel.evaluate ckpt=… [data.root=DIR] [split=val|test] [out=DIR]`: score a trained network.

Options: `--help`.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.conf_path import CONF
from vessel.errors import told_to_the_user


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Read the options and evaluate."""
    with told_to_the_user():
        from pathlib import Path

        from hydra.core.hydra_config import HydraConfig

        from vessel.evaluation.command import evaluate
        from vessel.evaluation.options import Options
        from vessel.options import typed

        evaluate(typed(cfg, Options, "vessel.evaluate"), Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
