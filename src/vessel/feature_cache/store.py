"""Files of features, one an image: complete or absent, verified at every read, named by digests alone."""

from __future__ import annotations

import logging
import os
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vessel.batch import FeaturePyramid, Features
from vessel.errors import DISK_FULL, VesselError
from vessel.files import readable, write_file

SUFFIX = ".safetensors"
NAMES = ("tile_features", *FeaturePyramid._fields)

log = logging.getLogger(__name__)


class FeatureStore:
    """Features in `<root>/<namespace>/<key>.safetensors`, where any number of processes read and write at once.

    A file is written under another name and renamed. All processes that write a key write the same content, so that
    none has to wait for another.

    Args:
        root: folder of all namespaces.

    Attributes:
        namespace: of the encoders in use, see `vessel.feature_cache.encoders`; while it is None nothing is found.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.namespace: str | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of the namespace in use."""
        assert self.namespace is not None
        return self.root / self.namespace

    def keys(self) -> set[str]:
        """Return the keys of all files in the namespace; no file is read."""
        with suppress(FileNotFoundError):
            return {name.removesuffix(SUFFIX) for name in os.listdir(self.folder) if name.endswith(SUFFIX)}
        return set()

    def contains(self, key: str) -> bool:
        """Return True if there is a file of this key, intact or not."""
        return self._file(key).exists()

    def get(self, key: str) -> Features | None:
        """Map the features of an image into memory; None without an intact file.

        A damaged file is removed, so that it is written again.

        Args:
            key: `vessel.data.images.pixel_hash` of the image that tiles and frame are cut from.
        """
        if self.namespace is None:
            return None
        file = self._file(key)
        try:
            with safe_open(str(file), "pt") as opened:  # refuses a file of another length than its header states
                stated = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in NAMES}
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            self._discard(file, " ".join(str(error).split()))
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s); its image is encoded again", file, error)
            return None
        wrong = [name for name, tensor in tensors.items() if stated.get(name) != self._checksum(key, name, tensor)]
        if wrong:
            self._discard(file, f"wrong checksum: {', '.join(wrong)}")
            return None
        return Features(tensors["tile_features"], FeaturePyramid(*(tensors[level] for level in FeaturePyramid._fields)))

    def put(self, key: str, features: Features) -> None:
        """Write the features of an image.

        Args:
            key: as in `get`.
            features: on any device.

        Raises:
            VesselError: the disk is full, or the write fails; no part of the file stays.
        """
        file = self._file(key)
        tensors = dict(zip(NAMES, (features.tile_features, *features.pyramid), strict=True))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(tensors, {name: self._checksum(key, name, tensor) for name, tensor in tensors.items()})
        try:
            write_file(file, content, private=True)
        except OSError as error:
            reason = "the disk or the quota is full" if error.errno in DISK_FULL else error.strerror
            raise VesselError(
                f"{self.folder}: features of {readable(len(content))} not written, {reason}; no partial file "
                "stays. Free space and go on with resume=auto, name another disk with cache.root=FOLDER, or leave the "
                "cache out with cache=none"
            ) from error

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _checksum(self, key: str, name: str, tensor: Tensor) -> str:
        """Compute CRC-32 over namespace, key, name, dtype, shape and bytes of a tensor: 8 hexadecimal digits."""
        begin = zlib.crc32(f"{self.namespace} {key} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        return f"{zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, begin):08x}"

    def _discard(self, file: Path, reason: str) -> None:
        with suppress(FileNotFoundError):
            file.unlink()
            log.warning("%s was damaged and is removed (%s); its image is encoded again", file, reason)
