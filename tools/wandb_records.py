"""Reads the file of an offline W&B run; some versions of W&B bring no reader of their own."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[Any]:
    """What was written so far: LevelDB's log format (blocks of 32 KiB, fragments with a 7 byte head), then protobuf."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part = data[position + 7 : position + 7 + length]
        if len(part) < length:
            return
        whole = part if kind in (1, 2) else whole + part
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def finished(path: Path) -> list[Any]:
    """All records; W&B's own process may still be writing when `wandb.finish` returns."""
    for _ in range(300):
        found = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no exit record")
