"""What leaves the machine: searched for raw identifiers, shown, and put on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from vessel.data.identity import RawIdentifiers
from vessel.errors import VesselError

# The vocabulary of a tokenizer: words of everybody's text, many of which are names.
_VOCABULARY = ("vocab.json", "merges.txt")


def refuse_raw_identifiers(folder: Path, scanner: RawIdentifiers, *names: str) -> int:
    """Search every text of a folder: file names, configurations, tokenizer, card, code.

    A tokenizer's own vocabulary is left out, its added tokens are not.

    Args:
        folder: what is to leave.
        scanner: knows what must not.
        names: other texts that will be seen, such as that of a repository.

    Returns:
        number of files searched.

    Raises:
        VesselError: naming the file.
    """
    texts = list(_texts(folder))
    for where, text in [*texts, *((f"the name {name}", name) for name in names)]:
        if found := scanner.find(text):
            raise VesselError(
                f"{where} would hold what looks like a patient's name or id ({', '.join(found[:3])}); take it out of "
                "the run's name, phrases or options. Nothing was exported"
            )
    return len(texts)


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    for file in _files(folder):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".safetensors" or file.name in _VOCABULARY:
            yield name, name
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # such as a SentencePiece model
            yield name, name
            continue
        if file.name == "tokenizer.json":
            content = json.loads(text)
            content.get("model", {}).clear()
            text = json.dumps(content, ensure_ascii=False)
        yield name, f"{name}\n{text}"


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
    console.print(f"to the hub, {repo} ({visibility}), {len(files)} files, {total / 1e9:.3f} GB:", soft_wrap=True)
    for file in files:
        name = file.relative_to(folder).as_posix()
        console.print(f"  {name}  {file.stat().st_size / 1e6:.3f} MB", soft_wrap=True, markup=False)
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
