import json

import torch

from vessel.training.callbacks.parameter_table import ParameterTable, parameter_groups, render


def test_rows_count_trainable_groups_and_the_frozen_rest(toy_task):
    network = toy_task().network.to(torch.bfloat16)
    rows = {row.group: row for row in parameter_groups(network)}
    assert list(rows) == ["projector", "mask_decoder", "encoder (frozen)"]
    assert (rows["projector"].tensors, rows["projector"].parameters) == (2, 4 * 3 + 4)
    assert rows["mask_decoder"].parameters == 2 * 4 + 2
    assert (rows["encoder (frozen)"].parameters, rows["encoder (frozen)"].trainable) == (12, False)
    assert rows["projector"].dtype == "bfloat16"
    assert render(rows.values()).row_count == 4


def test_prints_and_writes_at_fit_start(tmp_path, capsys, trainer, toy_task, batches):
    trainer(ParameterTable()).fit(toy_task(), batches())
    record = json.loads((tmp_path / "parameters.json").read_text())
    assert (record["total"], record["trainable"]) == (38, 26)
    assert record["groups"][1]["group"] == "mask_decoder"
    printed = capsys.readouterr().out
    assert "26 (68.4%)" in printed
    assert "encoder (frozen)" in printed
