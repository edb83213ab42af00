"""Log the mean scores and the report of an evaluation to W&B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from vessel.errors import VesselError
from vessel.loggers import PrivateWandb, log_page
from vessel.privacy.scanner import Scanner


def log_evaluation(settings: Mapping[str, Any] | None, report: Mapping[str, Any], folder: Path, data: Path) -> None:
    """Send the means of every score and `report.html`, after both were searched for raw identifiers.

    Args:
        settings: loggers as `conf/logger` has them; None logs nothing.
        report: content of metrics.json.
        folder: holds report.html.
        data: the data set whose names must not be sent.

    Raises:
        VesselError: another logger than W&B, or a name or an id of a patient.
    """
    for name, setting in (settings or {}).items():
        if name != "wandb":
            raise VesselError(f"logger={name}: an evaluation is logged by logger=wandb alone; its files hold all")
        logger: PrivateWandb = instantiate(setting, name=f"{report['run']} on {report['split']}", tags=["evaluation"])
        logger.scanner = Scanner.beside(data)
        logger.log_hyperparams({key: report[key] for key in ("run", "fingerprint", "split", "decision", "data")})
        means = {
            f"{report['split']}/{phrase}/{metric}": entry["mean"]
            for phrase, scores in report["summary"].items()
            for metric, entry in scores.items()
            if entry["mean"] is not None
        }
        logger.log_metrics(means)
        log_page([logger], f"report/{report['split']}", folder / "report.html")
        logger.experiment.finish()
