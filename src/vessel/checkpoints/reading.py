"""Checkpoints of a run: find them in its folder, verify them, and read them without running code."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import torch

from vessel.errors import VesselError
from vessel.runs.manifest import MANIFEST
from vessel.weights.zero import LATEST, is_zero_folder, open_zero, time_written

_UNFINISHED, _BACKUP = ".part", ".aside"
_FOLDER = 0x10  # attribute of a zip entry that is a folder
_TENSORS = "/data/"  # in the name of each zip entry that holds the numbers of a tensor
# Errors of zipfile on a file with changed bytes.
_DAMAGE = (BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error)


def unfinished_path(path: Path) -> Path:
    """Return the path of a checkpoint while it is being written."""
    return path.with_name(f".{path.name}{_UNFINISHED}")


def backup_path(path: Path) -> Path:
    """Return the path to which a folder is moved while a new one replaces it."""
    return path.with_name(f".{path.name}{_BACKUP}")


def is_leftover(path: Path) -> bool:
    """Return True if a file or folder was left by an interrupted save, and so is no checkpoint."""
    return path.name.startswith(".") and path.suffix in (_UNFINISHED, _BACKUP)


def restore_backups(folder: Path) -> None:
    """Rename backups that a killed save left to their old names, where no new folder has taken the name."""
    for backup in folder.glob(backup_path(Path("*")).name):
        path = backup.with_name(backup.name[1 : -len(_BACKUP)])
        if not path.exists():
            with suppress(FileNotFoundError):  # another rank was faster
                backup.rename(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints directly in a folder, intact or not; no unfinished ones."""
    return [path for path in folder.glob("*.ckpt") if path.exists() and not path.name.startswith(".")]


def find_checkpoint(run: Path, kinds: tuple[str, ...] = ("best", "last")) -> Path:
    """Find the newest checkpoint of a run folder, of the first kind that exists.

    Args:
        run: folder of the run, or a checkpoint that is a folder, as ZeRO-3 writes it.
        kinds: `best` by validation, `last` written.

    Raises:
        VesselError: the folder is no run, or has no checkpoint yet.
    """
    if is_zero_folder(run):
        _refuse_unfinished(run)
        return run
    for kind in kinds:
        for folder in (run, run / "checkpoints"):
            if found := sorted(folder.glob(f"{kind}*.ckpt"), key=time_written):
                return found[-1]
    found_instead = (
        "a run without checkpoint" if (run / MANIFEST).is_file() else "neither a run nor an export of vessel"
    )
    raise VesselError(
        f"{run}: {found_instead}; give a run folder (outputs/<name>/<time>), one of its checkpoints, or an export"
    )


def find_newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """Find the intact checkpoint of a run with the highest step; of one step, the one written last.

    Backups that a killed save left are renamed first. Checksums are verified from the newest on, until one checkpoint
    is intact.

    Args:
        run: folder of the run.

    Returns:
        the checkpoint, None without an intact one; the skipped ones, each with the reason.
    """
    restore_backups(run / "checkpoints")
    steps: dict[Path, int] = {}
    skipped = []
    for path in sorted(list_checkpoints(run / "checkpoints"), key=time_written, reverse=True):
        step = _step(path)
        if isinstance(step, str):
            skipped.append(f"{path.name}: {step}")
        else:
            steps[path] = step
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):  # stable: by time within a step
        if (reason := _find_damage(path)) is None:
            return path, skipped
        skipped.append(f"{path.name}: {reason}")
    return None, skipped


def find_defect(path: Path) -> str | None:
    """Find the defect of a checkpoint, a file or a folder of all ranks' files; None for an intact one.

    Every byte is read once and compared with the checksum that was written beside it, a megabyte at a time.
    """
    step = _step(path)
    return step if isinstance(step, str) else _find_damage(path)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a Lightning checkpoint of vessel, a file or a folder of ZeRO-3; code in it is never run.

    Raises:
        VesselError: damaged, or another kind of file, with the remedy.
    """
    _refuse_unfinished(path)
    try:
        if is_zero_folder(path):
            checkpoint = open_zero(path).metadata
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except VesselError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise VesselError(
            f"{path}: not a checkpoint that can be read safely ({type(error).__name__}); vessel.train writes "
            "outputs/<name>/<time>/checkpoints/*.ckpt, base weights belong into its `weights=[...]`"
        ) from error
    if not isinstance(checkpoint, dict) or "vessel" not in checkpoint:
        raise VesselError(
            f"{path}: weights, but no checkpoint of vessel.train, so their network and data are unknown. "
            "Base weights belong into `weights=[...]` of vessel.train"
        )
    return checkpoint


def _refuse_unfinished(path: Path) -> None:
    if is_leftover(path):
        raise VesselError(f"{path}: left over from a save that was cut short; give the run's folder, or another of its")


def _step(path: Path) -> int | str:
    """Read the optimizer step of a checkpoint without its tensors; a string is the reason why it cannot be read."""
    if path.is_dir() and not (path / LATEST).is_file():
        return f"without `{LATEST}`, which is written when the files of all ranks are"
    # With a wrong byte outside the tensors, reading can fail in every way.
    if (reason := _find_damage(path, tensors=False)) is not None:
        return reason
    try:
        step = read_checkpoint(path).get("global_step")
    except VesselError as error:
        return str(error).removeprefix(f"{path}: ").replace(f"{path}/", "")
    return step if isinstance(step, int) else "weights, without the step that they are of"


def _find_damage(path: Path, *, tensors: bool = True) -> str | None:
    """Find damage by the checksums in the files of a checkpoint; None for an intact one."""
    for file in sorted(path.rglob("*.pt")) if path.is_dir() else (path,):
        prefix = "" if file == path else f"{file.name}: "
        try:
            if file.stat().st_size == 0:
                return f"{prefix}empty"
            with ZipFile(file) as opened:
                for entry in opened.infolist():
                    if tensors or _TENSORS not in entry.filename:
                        _verify_checksum(opened, entry)
        except _DAMAGE as error:
            return f"{prefix}cut short, damaged, or no checkpoint ({error})"
        except OSError as error:
            return f"{prefix}cannot be read ({error.strerror})"
    return None


def _verify_checksum(opened: ZipFile, entry: ZipInfo) -> None:
    if entry.external_attr & _FOLDER:  # torch would read nothing of it, and leave the tensor uninitialised
        raise BadZipFile(f"{entry.filename} is marked as a folder")
    with opened.open(entry) as stream:
        while stream.read(2**20):  # the last one compares the checksum
            pass
