"""A report in W&B."""

import pytest
from tests.wandb_offline import media, read_history

from vessel.errors import VesselError
from vessel.loggers import JsonLines, PrivateWandb, log_page


@pytest.mark.slow
def test_wandb_has_the_page_as_it_is_and_none_with_a_name(written, tmp_path, monkeypatch):
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    page = written / "report.html"
    logger = PrivateWandb(save_dir=tmp_path / "views")
    log_page([JsonLines(tmp_path), logger], "report/test", page)
    named = tmp_path / "named.html"
    named.write_text(page.read_text().replace("lumen", "Bell^Ana"))
    with pytest.raises(VesselError, match=r"^W&B: .*named\.html "):
        log_page([logger], "report/test", named)
    logger.experiment.finish()
    [row] = [row for row in read_history(tmp_path / "views") if "report/test" in row]
    assert media(tmp_path / "views", row["report/test"]).read_bytes() == page.read_bytes()
