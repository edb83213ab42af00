"""List what leaves the machine, and upload it to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from vessel.errors import VesselError
from vessel.files import readable


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def check_repository(repo: str) -> None:
    """Raise VesselError where `repo` cannot be the name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise VesselError(f"push={repo}: no name of a repository (owner/name): {error}") from error


def push(folder: Path, repo: str, *, private: bool, console: Console) -> str:
    """Show what will go, and upload it.

    Args:
        folder: an export; it stays where it is.
        repo: `owner/name`; made when it is not there.
        private: only its owner sees it.
        console: where it is shown.

    Returns:
        address of the repository.

    Raises:
        VesselError: the hub does not answer or refuses, or the repository is public and should not be.
    """
    files = _files(folder)
    visibility = "private" if private else "PUBLIC"
    total = sum(file.stat().st_size for file in files)
    console.print(f"to the hub, {repo} ({visibility}), {len(files)} files, {readable(total)}:", soft_wrap=True)
    for file in files:
        name = file.relative_to(folder).as_posix()
        size = readable(file.stat().st_size, below=".3f")
        console.print(f"  {name}  {size}", soft_wrap=True, markup=False)
    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=private, exist_ok=True)
        if private and not hub.model_info(repo).private:
            raise VesselError(
                f"push={repo} is a public repository; choose another, make it private, or say private=false. "
                f"The export stays in {folder}"
            )
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of vessel")
    except (HTTPError, OSError) as error:
        told = (str(error).strip().splitlines() or [""])[0]
        raise VesselError(
            f"push={repo}: the hub was not reached or refused ({type(error).__name__}: {told}). The export is whole "
            f"and stays in {folder}; log in with `hf auth login`, then `hf upload {repo} {folder}`"
        ) from error
    return str(address)
