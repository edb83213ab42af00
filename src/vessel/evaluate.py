"""`python -m vessel.evaluate ckpt=… [data.root=DIR] [split=val|test] [out=DIR]`: score a trained network.

Options: `--help`.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.cli.composition import report_composition_errors
from vessel.cli.conf import CONF
from vessel.cli.exits import report_errors
from vessel.cli.values import check_values


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
def app(cfg: DictConfig) -> None:
    """Read the options and evaluate."""
    with report_errors():
        check_values(cfg, "evaluate")
        from pathlib import Path

        from hydra.core.hydra_config import HydraConfig

        from vessel.cli.options import typed
        from vessel.evaluation.command import evaluate
        from vessel.evaluation.options import EvaluateOptions

        evaluate(typed(cfg, EvaluateOptions, "vessel.evaluate"), Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Compose the configuration and evaluate."""
    with report_composition_errors("evaluate"):
        app()


if __name__ == "__main__":
    main()
