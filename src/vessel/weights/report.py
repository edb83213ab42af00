"""The outcome of a load of weights, module by module: as a table to print, and for the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class ModuleReport:
    """The outcome of a load for the tensors of one module.

    Attributes:
        module: such as `grounding.mask_decoder`.
        loaded, missing, unexpected, mismatched: names; missing ones are the network's, unexpected ones the source's,
            and a mismatched one comes with both shapes.
        elements: loaded, and required of the source: all of the network in this module, or those that train where the
            source holds trained parameters only.
        dtypes: in the source.
    """

    module: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    elements: tuple[int, int]
    dtypes: tuple[str, ...]

    @property
    def fraction(self) -> float:
        """Return the loaded fraction of the required elements, 0 to 1."""
        return self.elements[0] / self.elements[1] if self.elements[1] else 0.0


@dataclass(frozen=True)
class LoadReport:
    """The outcome of a load, made from the load itself.

    Attributes:
        source: as the configuration names it.
        kind: what it was recognised as.
        revision: commit of a hub id.
        modules: in the network's order.
        left_out: number of tensors of modules outside `partial`.
        grown: rows of embedding and head in the source, where the network has more for its added tokens.
        fingerprint: of the tensors taken, under our names, as the source has them.
    """

    source: str
    kind: str
    revision: str | None
    modules: tuple[ModuleReport, ...]
    left_out: int = 0
    grown: int | None = None
    fingerprint: str = ""

    def names(self, field: str) -> list[str]:
        """Return the names of one list, such as `missing`, over all modules."""
        return [name for module in self.modules for name in getattr(module, field)]

    def summary(self) -> dict[str, Any]:
        """Return plain values for a manifest: counts instead of names."""
        modules = [
            {
                "module": m.module, "loaded": len(m.loaded), "missing": len(m.missing), "unexpected": len(m.unexpected),
                "mismatched": len(m.mismatched), "share": m.fraction, "dtypes": list(m.dtypes),
            }
            for m in self.modules
        ]  # fmt: skip
        return {**asdict(self), "modules": modules}

    def table(self) -> Table:
        """Return the report as a table to print."""
        title = f"{self.kind} {self.source}" + (f"@{self.revision[:12]}" if self.revision else "")
        if self.grown is not None:
            title += f"; {self.grown} rows of its vocabulary, those of added tokens are new"
        if self.left_out:
            title += f"; {self.left_out} tensors of other modules"
        table = Table(title=f"{title}\nfingerprint {self.fingerprint}", title_justify="left", box=None, pad_edge=False)
        for column in ("module", "loaded", "missing", "unexpected", "other\nshape", "share", "dtype"):
            table.add_column(column, justify="left" if column in ("module", "dtype") else "right")
        for m in self.modules:
            counts = (str(len(names)) for names in (m.loaded, m.missing, m.unexpected, m.mismatched))
            table.add_row(m.module, *counts, f"{m.fraction:.2%}", " ".join(m.dtypes))
        return table
