"""python -m vessel.train experiment=NAME [data.root=DIR] [option=value ...]: fine-tune Sa2VA on a prepared data set."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.command_line import settle
from vessel.conf_path import CONF
from vessel.errors import told_to_the_user
from vessel.launch import launched
from vessel.ranks import leave_on_signals


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def app(config: DictConfig) -> float | None:
    """Train as configured; the best validation Dice is the value that a sweep maximises."""
    with told_to_the_user():
        return launched(config)


def main() -> None:
    """Settle what Hydra has to find settled, then train."""
    leave_on_signals()
    with told_to_the_user():
        settle()
    app()


if __name__ == "__main__":
    main()
