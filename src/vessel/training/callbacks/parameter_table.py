"""A table of trainable and frozen parameters: printed, written to the run folder and logged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn
from typing_extensions import override

from vessel.loggers import log_table


@dataclass(frozen=True)
class ParameterGroup:
    """A row of the table.

    Attributes:
        group: a trainable group, or a part of the network with its frozen rest.
        tensors, parameters: how many; a shared tensor counts once.
        trainable: whether the optimizer gets them.
        dtype: of the tensors, several separated by commas.
    """

    group: str
    tensors: int
    parameters: int
    trainable: bool
    dtype: str


class ParameterTable(Callback):
    """A callback that writes the table at the start of `fit`: terminal, `<run>/parameters.json`, and a W&B table."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        rows = parameter_groups(pl_module.network)  # type: ignore[arg-type]
        Console().print(render(rows))
        total, trainable = sum(r.parameters for r in rows), sum(r.parameters for r in rows if r.trainable)
        record = {"total": total, "trainable": trainable, "groups": [asdict(row) for row in rows]}
        file = Path(trainer.default_root_dir) / "parameters.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        columns = [field.name for field in fields(ParameterGroup)]
        log_table(trainer.loggers, "parameters", columns, map(astuple, rows), trainer.global_step)


def parameter_groups(network: nn.Module) -> list[ParameterGroup]:
    """Count the parameters of the trainable groups, then the frozen ones of each child of the network.

    Args:
        network: a module with `trainable_groups()`; its parameters may be on the meta device or sharded by DeepSpeed.
    """
    groups = network.trainable_groups()  # type: ignore[operator]
    rows = [_row(name, (p for _, p in members), trainable=True) for name, members in groups.items()]
    grouped = {id(p) for members in groups.values() for _, p in members}
    frozen: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if id(parameter) not in grouped:
            frozen.setdefault(name.split(".")[0], []).append(parameter)
    return rows + [_row(f"{name} (frozen)", parameters, trainable=False) for name, parameters in frozen.items()]


def render(rows: Iterable[ParameterGroup]) -> Table:
    """Render the rows and their total as a terminal table."""
    table = Table(title="Parameters")
    for heading, justify in {"group": "left", "tensors": "right", "parameters": "right", "trainable": "right"}.items():
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("dtype")
    rows = list(rows)
    for row in rows:
        trainable = row.parameters if row.trainable else 0
        table.add_row(row.group, f"{row.tensors:,}", f"{row.parameters:,}", f"{trainable:,}", row.dtype)
    total, trainable = sum(r.parameters for r in rows), sum(r.parameters for r in rows if r.trainable)
    table.add_section()
    fraction = f"{trainable:,} ({trainable / max(total, 1):.1%})"
    table.add_row("total", f"{sum(r.tensors for r in rows):,}", f"{total:,}", fraction, "")
    return table


def _row(group: str, parameters: Iterable[nn.Parameter], *, trainable: bool) -> ParameterGroup:
    members = list(parameters)
    return ParameterGroup(
        group=group,
        tensors=len(members),
        parameters=sum(
            getattr(p, "ds_numel", p.numel()) for p in members
        ),  # a ZeRO-3 shard is empty where it is not used
        trainable=trainable,
        dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in members})),
    )
