"""`python -m vessel.export ckpt=… out=DIR [layout=sa2va|native|adapter] [dtype=bf16|fp32]`: a folder, proved equal.

Options: `--help`.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.conf_path import CONF
from vessel.errors import told_to_the_user


@hydra.main(version_base="1.3", config_path=CONF, config_name="export")
def main(cfg: DictConfig) -> None:
    """Read the options and export."""
    with told_to_the_user():
        from vessel.options import typed
        from vessel.publishing.publication import Options, export

        export(typed(cfg, Options, "vessel.export"))


if __name__ == "__main__":
    main()
