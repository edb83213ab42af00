"""The mapping from names to pseudonyms: its folder beside the data set, read and written."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vessel.data.identity import Pseudonyms
from vessel.errors import VesselError
from vessel.files import write_file

MAPPING_FILE = "mapping.json"


def mapping_folder(out: Path) -> Path:
    """Return the folder of the mapping of the data set `out`, unless the user chose another one."""
    return out.with_name(out.name + ".identity")


def read_mapping(folder: Path) -> dict[str, Any]:
    """Read the mapping of a folder.

    Returns:
        `patients`: pseudonym by key; `files`: frame id by raw stem; `names`: raw spellings. All may be empty.

    Raises:
        VesselError: it cannot be read.
    """
    kept = folder / MAPPING_FILE
    if not kept.is_file():
        return {"patients": {}, "files": {}, "names": []}
    try:
        return json.loads(kept.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VesselError(f"{kept} is damaged; restore it from a copy, or delete it and prepare again") from error


@dataclass(frozen=True)
class MappingFolder:
    """A folder of raw names and their pseudonyms: outside the data set, readable by the owner only."""

    path: Path

    def check(self) -> None:
        """Raise VesselError where other files are, or a file: raw names must not get among them."""
        kept = sorted(each.name for each in self.path.iterdir()) if self.path.is_dir() else []
        if self.path.is_file() or (kept and not {"salt", MAPPING_FILE} & set(kept)):
            what = f"holds {kept[0]} and no mapping of ours" if kept else "is a file"
            raise VesselError(f"mapping: {self.path} {what}; choose an empty or a new folder with mapping=DIR")

    def salt(self) -> bytes:
        """Read the salt, or make a new random one, which `write` writes."""
        kept = self.path / "salt"
        if not kept.is_file():
            return secrets.token_bytes(32)
        try:
            return bytes.fromhex(kept.read_text().strip())
        except ValueError as error:
            raise VesselError(f"{kept} is damaged; restore it from a copy, or delete it for new pseudonyms") from error

    def write(self, salt: bytes, pseudonyms: Pseudonyms, stems: Sequence[str]) -> None:
        """Write the salt and the mapping of files with these raw stems, added to what the folder holds already."""
        self.check()
        if not self.path.exists():  # a folder that the user made keeps its mode; our files are 0600 in any
            self.path.mkdir(mode=0o700, parents=True)
        before = read_mapping(self.path)
        files = {stem: identity.id for stem, identity in zip(stems, pseudonyms.identities, strict=True)}
        content = {
            "patients": {**before["patients"], **pseudonyms.patients},
            "files": {**before["files"], **files},
            "names": sorted({*before["names"], *pseudonyms.names}),
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        write_file(self.path / "salt", salt.hex() + "\n", private=True)
        write_file(self.path / MAPPING_FILE, text, private=True)
