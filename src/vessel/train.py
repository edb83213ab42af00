"""python -m vessel.train experiment=NAME [data.root=DIR] [option=value ...]: fine-tune Sa2VA on a prepared data set."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.conf_path import CONF
from vessel.errors import told_to_the_user


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(config: DictConfig) -> float | None:
    """Train as configured; the best validation Dice is the value that a sweep maximises."""
    with told_to_the_user():
        from vessel.training import train

        return train(config)


if __name__ == "__main__":
    main()
