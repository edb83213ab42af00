import json
import os
import sys

import numpy as np
import pytest
from PIL import Image
from tests.wandb_offline import media, read_history, records

from vessel.loggers import PrivateWandb
from vessel.metrics.thresholds import THRESHOLDS
from vessel.training.callbacks.mask_panels import MaskPanels
from vessel.training.callbacks.parameter_table import ParameterTable
from vessel.training.callbacks.threshold_sweep import ThresholdSweep


@pytest.mark.slow
def test_guard_D11_an_offline_run_holds_curves_panels_and_tables_and_nothing_of_this_machine(
    tmp_path, monkeypatch, trainer, toy_task, batches
):
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = PrivateWandb(save_dir=tmp_path / "offline", name="toy", tags=["oct"])
    sweep = ThresholdSweep()
    trainer(sweep, MaskPanels(images=1), ParameterTable(), logger=logger, max_epochs=2).fit(
        toy_task(), batches(), batches(2)
    )
    logger.experiment.finish()
    history = read_history(tmp_path / "offline")

    def logged(name: str) -> list:
        return [row[name] for row in history if name in row]

    assert len(logged("val/dice_best")) == 2
    assert logged("val/threshold")[-1] == pytest.approx(sweep.threshold)
    for name, written in {
        "val/threshold_sweep": "threshold_sweep/step_000006.png",
        "panels/p0_v0_000": "panels/step_000006_p0_v0_000.png",
    }.items():
        assert len(logged(name)) == 2
        with Image.open(media(tmp_path / "offline", logged(name)[-1])) as sent, Image.open(tmp_path / written) as file:
            assert np.array_equal(np.asarray(sent), np.asarray(file))
    table = json.loads(media(tmp_path / "offline", logged("val/threshold_sweep_table")[-1]).read_text())
    assert table["columns"] == ["threshold", "dice", "iou", "precision", "recall"]
    assert [row[0] for row in table["data"]] == list(THRESHOLDS)
    assert [row[1] for row in table["data"]] == pytest.approx(sweep.curve["dice"])
    parameters = json.loads(media(tmp_path / "offline", logged("parameters")[0]).read_text())
    assert [row[0] for row in parameters["data"]] == ["projector", "mask_decoder", "encoder (frozen)"]
    log = list(records(next((tmp_path / "offline").rglob("*.wandb"))))
    [run] = [record.run for record in log if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, list(run.tags), run.host) == ("vessel", "toy", ["oct"], "")
    assert not {record.WhichOneof("record_type") for record in log} & {"environment", "output", "output_raw"}
    # `wandb sync` sends these records, without the path that a table is read from, and the files beside them.
    lines = "\n".join(str(record) for record in log).splitlines()
    files = [path for path in (tmp_path / "offline").rglob("files/**/*") if path.is_file()]
    assert {file.suffix for file in files} == {".png", ".json"}
    leaving = ["\n".join(line for line in lines if "local_path:" not in line).encode()]
    leaving += [file.read_bytes() for file in files]
    program = [sys.argv[0]] if os.path.isabs(sys.argv[0]) else []  # a worker of pytest-xdist has only "-c"
    for text in (str(tmp_path), os.getcwd(), sys.executable, *program, "requirements.txt"):
        assert not [content for content in leaving if text.encode() in content], text
