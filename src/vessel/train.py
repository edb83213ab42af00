"""python -m vessel.train experiment=NAME [data.root=DIR] [option=value ...]: fine-tune Sa2VA on a prepared data set."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.cli.argv import complete_argv
from vessel.cli.composition import report_composition_errors
from vessel.cli.conf import CONF
from vessel.cli.exits import report_errors
from vessel.cli.values import check_values
from vessel.processes.launch import launch
from vessel.processes.signals import leave_on_signals


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def app(config: DictConfig) -> float | None:
    """Train as configured; the best validation Dice is the value that a sweep maximises."""
    with report_errors():
        check_values(config, "train")
        return launch(config, _train)


def _train(config: DictConfig) -> float | None:
    from vessel.training.run import train  # heavy, and in the parent of ranks not needed

    return train(config)


def main() -> None:
    """Settle what Hydra has to find settled, then train."""
    leave_on_signals()
    with report_errors(), report_composition_errors("train"):
        complete_argv()
        app()


if __name__ == "__main__":
    main()
