"""Read a W&B offline run back: its `.wandb` file is a LevelDB log of protobuf records."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
FILE_HEADER = 7  # ":W&B", a magic number, a version
RECORD_HEADER = struct.Struct("<IHB")  # checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path) -> Iterator[Any]:
    """Protobuf `Record`s of a `run-*.wandb` file."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    position, parts = FILE_HEADER, b""
    while position + RECORD_HEADER.size <= len(data):
        if BLOCK - position % BLOCK < RECORD_HEADER.size:  # a block's tail too short for a header is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = RECORD_HEADER.unpack_from(data, position)
        position += RECORD_HEADER.size
        if position + length > len(data):
            return  # still being written
        parts += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Logged rows of the only run under `folder`: numbers, and dicts with `_type` for pictures and tables."""
    (file,) = folder.rglob("run-*.wandb")
    deadline = time.monotonic() + 20
    while "exit" not in {record.WhichOneof("record_type") for record in records(file)}:
        # W&B's service writes the file, and may still be at it when `finish` returns.
        assert time.monotonic() < deadline, f"{file.name} has no end; was the run finished?"
        time.sleep(0.1)
    return [_row(r.history.item) for r in records(file) if r.WhichOneof("record_type") == "history"]


def _row(items: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]  # a picture or table comes as one item a field
        target = row
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = json.loads(item.value_json)
    return row


def media(folder: Path, value: dict[str, Any]) -> Path:
    """The file of a picture or table of `read_history`, which names it in `path` or `filenames`."""
    (file,) = folder.rglob(Path(value.get("path") or value["filenames"][0]).name)
    return file
