"""`python -m vessel.export ckpt=… out=DIR [layout=sa2va|native|adapter] [dtype=bf16|fp32]`: a folder, proved equal.

Options: `--help`.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from vessel.cli.composition import report_composition_errors
from vessel.cli.conf import CONF
from vessel.cli.exits import report_errors
from vessel.cli.values import check_values


@hydra.main(version_base="1.3", config_path=CONF, config_name="export")
def app(cfg: DictConfig) -> None:
    """Read the options and export."""
    with report_errors():
        check_values(cfg, "export")
        from vessel.cli.options import typed
        from vessel.publishing.command import ExportOptions, export

        export(typed(cfg, ExportOptions, "vessel.export"))


def main() -> None:
    """Compose the configuration and export."""
    with report_composition_errors("export"):
        app()


if __name__ == "__main__":
    main()
