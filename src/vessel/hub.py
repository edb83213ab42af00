"""Names on the Hugging Face hub, `hf://owner/name[/file][@revision]`: nothing else is ever looked up there.

A path that does not exist is an error on this machine; its name, which may be a patient's, is sent nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vessel.errors import VesselError

PREFIX = "hf://"
_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[^@]+?))?(?:@(?P<revision>[^@]+))?")


@dataclass(frozen=True)
class HubName:
    """A repository on the hub, or a file in it.

    Attributes:
        repository: `owner/name`.
        file: its path in the repository; None for the whole repository.
        revision: commit, tag or branch; None for the newest.
    """

    repository: str
    file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Read `hf://owner/name[/file][@revision]`.

        Raises:
            VesselError: it has another form.
        """
        found = _NAME.fullmatch(text.removeprefix(PREFIX))
        if found is None or not is_hub_name(text):
            raise VesselError(f"{text}: write a name on the hub as {PREFIX}OWNER/NAME[/FILE][@REVISION]")
        return cls(**found.groupdict())

    def download(self, *, repo_type: str = "model", patterns: Sequence[str] | None = None) -> tuple[Path, str]:
        """Fetch it into the cache of huggingface_hub, or find it there.

        Args:
            repo_type: `model` or `dataset`.
            patterns: of the files to fetch; None for all.

        Returns:
            the folder or file on this machine, and its commit.

        Raises:
            VesselError: the hub does not give it.
        """
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            if self.file is not None:
                path = Path(hf_hub_download(self.repository, self.file, revision=self.revision, repo_type=repo_type))
                return path, path.parents[self.file.count("/")].name
            path = Path(
                snapshot_download(
                    self.repository,
                    revision=self.revision,
                    repo_type=repo_type,
                    allow_patterns=None if patterns is None else list(patterns),
                )
            )
        except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
            raise VesselError(
                f"{self}: the hub does not give it ({reason}); check the spelling, the connection and `hf auth login`, "
                "or download it elsewhere and name the folder"
            ) from error
        return path, path.name

    def __str__(self) -> str:
        """Write it as it is typed."""
        file = "" if self.file is None else f"/{self.file}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{PREFIX}{self.repository}{file}{revision}"


def is_hub_name(text: str) -> bool:
    """Return whether a text names the hub."""
    return text.startswith(PREFIX)


def hub_hint(text: str) -> str:
    """Say how a text that is no path here would name the hub; empty where it has not that form."""
    return f"; if it is on the Hugging Face hub, write {PREFIX}{text}" if _NAME.fullmatch(text) else ""
