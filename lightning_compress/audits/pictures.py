"""Pictures as PNG bytes, made of tensors with the standard library alone: reports need no plotting package."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 112  # pixels: smaller images are enlarged, so that they can be seen
_GAP = 4
_PAPER = 255


def png(image: Tensor) -> bytes:
    """An image as a PNG file.

    Args:
        image: uint8 (H, W) of grey or (H, W, 3) of colours.

    Raises:
        ValueError: It is something else.

    Example:
        >>> png(torch.zeros(2, 2, dtype=torch.uint8))[1:4]
        b'PNG'
    """
    if image.dtype != torch.uint8 or image.dim() not in (2, 3) or (image.dim() == 3 and image.shape[2] != 3):
        raise ValueError(f"expected uint8 (H, W) or (H, W, 3); got {image.dtype} {tuple(image.shape)}")
    height, width = image.shape[:2]
    rows = image.detach().cpu().contiguous().numpy()
    data = b"".join(b"\x00" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if image.dim() == 3 else 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(data, 9)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_artifact(name: str, data: bytes, caption: str = "") -> dict[str, Any]:
    """A picture as an artifact of an audit: base64, as JSON and HTML take it."""
    return {"name": name, "kind": "png", "data": base64.b64encode(data).decode("ascii"), "note": caption}


def signed_colours(values: Tensor, scale: float) -> Tensor:
    """Blue for negative, white for zero, red for positive.

    Args:
        values: (H, W).
        scale: The absolute value that gets full colour.

    Returns:
        uint8 (H, W, 3).

    Example:
        >>> signed_colours(torch.tensor([[-1.0, 0.0, 1.0]]), 1.0)[0].tolist()
        [[0, 70, 200], [255, 255, 255], [200, 30, 30]]
    """
    share = (values.double() / (scale or 1.0)).clamp(-1, 1)[..., None]
    white = torch.tensor([255.0, 255.0, 255.0], dtype=torch.double)
    red, blue = (torch.tensor(c, dtype=torch.double) for c in ([200.0, 30.0, 30.0], [0.0, 70.0, 200.0]))
    ends = torch.where(share.cpu() >= 0, red, blue)
    return (white + (ends - white) * share.cpu().abs()).round().to(torch.uint8)


def image_colours(image: Tensor) -> Tensor:
    """An input image (C, H, W) as uint8 (H, W, 3): colours of three channels, else the mean of all as grey."""
    x = image.detach().double().cpu()
    x = x if len(x) == 3 else x.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = float(x.min()), float(x.max())
    return ((x - low) / ((high - low) or 1.0) * 255).round().to(torch.uint8).permute(1, 2, 0)


def grid_png(rows: Sequence[Sequence[Tensor]]) -> bytes:
    """Images in rows and columns as one PNG file.

    Args:
        rows: Each cell is an image (C, H, W), or uint8 (H, W, 3) that is shown as it is.
    """
    lines = []
    for row in rows:
        cells = [_enlarged(cell if cell.dtype == torch.uint8 else image_colours(cell)) for cell in row]
        height = max(len(cell) for cell in cells)
        lines.append(torch.cat([_padded(cell, height) for cell in cells], 1))
    width = max(line.shape[1] for line in lines)
    return png(torch.cat([_padded(line, len(line), width) for line in lines]))


def _padded(cell: Tensor, height: int, width: int | None = None) -> Tensor:
    right = _GAP if width is None else width - cell.shape[1]
    below = height - len(cell) + (_GAP if width is None else 0)
    return F.pad(cell, (0, 0, 0, right, 0, below), value=_PAPER)


def _enlarged(cell: Tensor) -> Tensor:
    times = max(1, _SIDE // max(cell.shape[:2]))
    return cell.repeat_interleave(times, 0).repeat_interleave(times, 1)
