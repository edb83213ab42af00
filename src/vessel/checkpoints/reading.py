"""Checkpoints of a run: found in its folder, judged, and read without running code."""

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

_PART, _ASIDE = ".part", ".aside"
_FOLDER = 0x10  # a zip file's mark of a part that is a folder
_TENSORS = "/data/"  # in the name of each part of a file that is the numbers of a tensor
# What zipfile raises on a file whose bytes changed, by where they did.
_DAMAGE = (BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error)


def part_of(path: Path) -> Path:
    """Return the path of a checkpoint while it is being written."""
    return path.with_name(f".{path.name}{_PART}")


def aside_of(path: Path) -> Path:
    """Return the path that a folder has for a moment while a new one replaces it."""
    return path.with_name(f".{path.name}{_ASIDE}")


def is_leftover(path: Path) -> bool:
    """Tell whether a file or folder was left by an interrupted save, and is no checkpoint."""
    return path.name.startswith(".") and path.suffix in (_PART, _ASIDE)


def put_back(folder: Path) -> None:
    """Give folders that a killed save had moved aside their names again, where nothing has come into their place."""
    for aside in folder.glob(aside_of(Path("*")).name):
        path = aside.with_name(aside.name[1 : -len(_ASIDE)])
        if not path.exists():
            with suppress(FileNotFoundError):  # another rank was faster
                aside.rename(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints directly in a folder, good or not; no unfinished ones."""
    return [path for path in folder.glob("*.ckpt") if path.exists() and not path.name.startswith(".")]


def find_checkpoint(run: Path, kinds: tuple[str, ...] = ("best", "last")) -> Path:
    """The newest checkpoint of a run folder, of the first kind that is there.

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
    what = "a run without checkpoint" if (run / MANIFEST).is_file() else "neither a run nor an export of vessel"
    raise VesselError(f"{run}: {what}; give a run folder (outputs/<name>/<time>), one of its checkpoints, or an export")


def newest_good(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of a run to go on from: of the highest step, at the same step the one written last.

    What a killed save had moved aside gets its name again. Checksums are looked at from the newest on, until one is
    good.

    Args:
        run: folder of the run.

    Returns:
        the checkpoint, None where none is good; what was passed over, each with its reason.
    """
    put_back(run / "checkpoints")
    steps: dict[Path, int] = {}
    skipped = []
    for path in sorted(checkpoints_in(run / "checkpoints"), key=time_written, reverse=True):
        step = _step(path)
        if isinstance(step, str):
            skipped.append(f"{path.name}: {step}")
        else:
            steps[path] = step
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):  # stable: by time within a step
        if (reason := _damage(path)) is None:
            return path, skipped
        skipped.append(f"{path.name}: {reason}")
    return None, skipped


def fault(path: Path) -> str | None:
    """Find the fault of a checkpoint, a file or a folder of all ranks' files; None for a good one.

    Every byte is read once and compared with the checksum that was written beside it, a megabyte at a time.
    """
    step = _step(path)
    return step if isinstance(step, str) else _damage(path)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a Lightning checkpoint of vessel, a file or what ZeRO-3 writes; code in it is never run.

    Raises:
        VesselError: damaged, or another kind of file, with the remedy.
    """
    _refuse_unfinished(path)
    try:
        if is_zero_folder(path):
            checkpoint = open_zero(path).beside
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
            f"{path}: weights, but no checkpoint of vessel.train: nothing says what network or data they belong to. "
            "Base weights belong into `weights=[...]` of vessel.train"
        )
    return checkpoint


def _refuse_unfinished(path: Path) -> None:
    if is_leftover(path):
        raise VesselError(f"{path}: left over from a save that was cut short; give the run's folder, or another of its")


def _step(path: Path) -> int | str:
    """The optimizer step of a checkpoint, from a look that leaves its tensors alone; or why it cannot be one."""
    if path.is_dir() and not (path / LATEST).is_file():
        return f"without `{LATEST}`, which is written when the files of all ranks are"
    # With a wrong byte in what is no tensor, reading can fail in every way.
    if (reason := _damage(path, tensors=False)) is not None:
        return reason
    try:
        step = read_checkpoint(path).get("global_step")
    except VesselError as error:
        return str(error).removeprefix(f"{path}: ").replace(f"{path}/", "")
    return step if isinstance(step, int) else "weights, without the step that they are of"


def _damage(path: Path, *, tensors: bool = True) -> str | None:
    """Find damage by the checksums in the files of a checkpoint; None when it is what was written."""
    for file in sorted(path.rglob("*.pt")) if path.is_dir() else (path,):
        named = "" if file == path else f"{file.name}: "
        try:
            if file.stat().st_size == 0:
                return f"{named}empty"
            with ZipFile(file) as opened:
                for part in opened.infolist():
                    if tensors or _TENSORS not in part.filename:
                        _read_through(opened, part)
        except _DAMAGE as error:
            return f"{named}cut short, damaged, or no checkpoint ({error})"
        except OSError as error:
            return f"{named}cannot be read ({error.strerror})"
    return None


def _read_through(opened: ZipFile, part: ZipInfo) -> None:
    if part.external_attr & _FOLDER:  # torch would read nothing of it, and leave the tensor as memory was
        raise BadZipFile(f"{part.filename} is marked as a folder")
    with opened.open(part) as stream:
        while stream.read(2**20):  # the last one compares the checksum
            pass
