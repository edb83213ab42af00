"""An entry of the configuration's list `weights`: a name, and what to take of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vessel.errors import VesselError
from vessel.paths import expanded

_FILES_OF_INTEREST = ("*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.jinja")


@dataclass(frozen=True)
class Weights:
    """An entry of the configuration's list `weights`.

    Attributes:
        source: folder, file, or hub id, which may name a file and a revision: `owner/name/file.pt@revision`.
        revision: of a hub id: a commit, tag or branch; with one, a local folder of that name is not looked at.
        partial: modules to take and no others, such as `grounding.mask_decoder`; empty takes all.
        share: of the elements of those modules, how many must be there at least, 0 to 1.
        untie: take the embedding for the head as well, where a language model ties the two.
    """

    source: str
    revision: str | None = None
    partial: Sequence[str] = ()
    share: float = 1.0
    untie: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise VesselError(f"weights: source={self.source!r}: a folder, a file or a hub id, in quotes if need be")
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
        """The entries of a configuration: one or several, each a name or a mapping of this class's fields.

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

    def pinned(self) -> Weights:
        """This entry with the commit that a hub id stands for today, or the whole path: a run can be repeated."""
        path, commit = self.fetch()
        if commit is None:
            return replace(self, source=str(path.absolute()))
        return replace(self, source=self.source.partition("@")[0], revision=commit)

    def fetch(self) -> tuple[Path, str | None]:
        """The place on this machine, downloaded if need be, and the commit of a hub id.

        Raises:
            VesselError: nothing of that name here, and the hub does not give it.
        """
        if self.revision is None and (place := expanded(self.source)).exists():
            return place, None
        named, _, at = self.source.partition("@")
        owner, _, rest = named.partition("/")
        name, _, file = rest.partition("/")
        repository, revision = f"{owner}/{name}" if rest else owner, self.revision or at or None
        try:
            if file:
                found = Path(hf_hub_download(repository, file, revision=revision))
                return found, found.parents[file.count("/")].name
            folder = snapshot_download(repository, revision=revision, allow_patterns=list(_FILES_OF_INTEREST))
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise VesselError(
                f"{self.source}: no folder or file of that name, and the hub does not give it "
                f"({type(error).__name__}); check the spelling, or download it elsewhere and name the folder"
            ) from error
        return Path(folder), Path(folder).name
