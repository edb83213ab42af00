"""An entry of the configuration's list `weights`: a source, and the modules to take from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vessel.errors import VesselError
from vessel.hub import HubName, hub_hint, is_hub_name
from vessel.paths import expanded

_FILES_OF_INTEREST = ("*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.jinja")


@dataclass(frozen=True)
class Weights:
    """An entry of the configuration's list `weights`.

    Attributes:
        source: folder, file, or a name on the hub, `hf://owner/name[/file][@revision]`.
        revision: commit, tag or branch of a name on the hub, in place of the one in `source`.
        partial: modules to take and no others, such as `grounding.mask_decoder`; empty takes all.
        share: least fraction of the elements of those modules that the source must hold, 0 to 1.
        untie: take the embedding for the head as well, where a language model ties the two.
    """

    source: str
    revision: str | None = None
    partial: Sequence[str] = ()
    share: float = 1.0
    untie: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise VesselError(
                f"weights: source={self.source!r}: a folder, a file or hf://OWNER/NAME, in quotes if need be"
            )
        if self.revision is not None and not is_hub_name(self.source):
            raise VesselError(
                f"weights: revision={self.revision} of {self.source}: only what is on the hub has one"
                f"{hub_hint(self.source)}"
            )
        if isinstance(self.partial, str):
            raise VesselError(f"weights: partial={self.partial} of {self.source}: a list, partial: [{self.partial}]")
        if not 0 < self.share <= 1:
            raise VesselError(f"weights: share={self.share} of {self.source}: a number above 0, 1 at most")
        if self.share < 1 and not self.partial:
            raise VesselError(
                f"weights: share={self.share} of {self.source}: only with partial=[...], module by module"
            )

    @classmethod
    def listed(cls, entries: Any) -> list[Weights]:
        """Parse the entries of a configuration: one or several, each a name or a mapping of this class's fields.

        Raises:
            VesselError: an entry is neither, or has an unknown field.
        """
        entries = [entries] if isinstance(entries, str | Mapping) else list(entries or [])
        return [cls._of(entry) for entry in entries]

    @classmethod
    def _of(cls, entry: Any) -> Weights:
        if isinstance(entry, str):
            return cls(entry)
        try:
            return cls(**entry)
        except TypeError as error:
            fields = ", ".join(cls.__dataclass_fields__)
            raise VesselError(f"weights: {entry!r} is no source; give a name, or a mapping with {fields}") from error

    @property
    def hub_name(self) -> HubName | None:
        """Return the repository or file on the hub, with the revision of this entry; None for a local path."""
        if not is_hub_name(self.source):
            return None
        name = HubName.parse(self.source)
        return replace(name, revision=self.revision or name.revision)

    def pinned(self) -> Weights:
        """Return this entry with its commit on the hub, or its absolute path, so that a run can be repeated."""
        path, commit = self.fetch()
        if commit is None:
            return replace(self, source=str(path.absolute()))
        return replace(self, source=str(replace(HubName.parse(self.source), revision=None)), revision=commit)

    def fetch(self) -> tuple[Path, str | None]:
        """Find the weights on this machine, downloaded first where the source names the hub.

        Returns:
            folder or file, and the commit of what is on the hub.

        Raises:
            VesselError: no such path on this machine, or the hub does not give it.
        """
        if (name := self.hub_name) is not None:
            return name.download(patterns=_FILES_OF_INTEREST)
        path = expanded(self.source)
        if not path.exists():
            raise VesselError(f"{self.source}: no folder or file of that name{hub_hint(self.source)}")
        return path, None
