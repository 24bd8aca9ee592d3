"""Patterns of zeros and the units that they are made of.

All patterns see a weight as `[O, I, P]`: output units, input units (channels of one group for convolutions), kernel
positions. `out_dim=1` says that the output units are dimension 1 (transposed convolutions, `[I, O, kh, kw]`).
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError

Kind = Literal["unstructured", "n:m", "row", "column", "filter", "block"]
_FORMS = '"unstructured", "N:M" (such as "2:4"), "row", "column", "filter" or "block:RxC"'


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern; make it with `parse`.

    Args:
        kind: What the zeros form.
        sizes: `(N, M)` of N:M, `(R, C)` of a block (R output units by C input units), else `(1, 1)`.
    """

    kind: Kind
    sizes: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        first, second = self.sizes
        return {"n:m": f"{first}:{second}", "block": f"block:{first}x{second}"}.get(self.kind, self.kind)

    @property
    def most(self) -> float:
        """The highest sparsity that the pattern allows: 1 - N/M for N:M, else 1."""
        return 1 - self.sizes[0] / self.sizes[1] if self.kind == "n:m" else 1.0


def parse(pattern: str | Pattern) -> Pattern:
    """Reads a pattern.

    Args:
        pattern: "unstructured"; "N:M", keep N of every M consecutive weights along the input dimension
            (1 <= N < M); "row", output units of a Linear; "column", input units or channels; "filter", output
            filters of a convolution; "block:RxC", blocks of R outputs by C inputs at each kernel position.

    Raises:
        ValueError: The text is no pattern.

    Example:
        >>> parse("2:4")
        Pattern(kind='n:m', sizes=(2, 4))
        >>> str(parse("block:4x1"))
        'block:4x1'
    """
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be {_FORMS}; found {pattern!r} of {type(pattern).__name__}")
    if pattern in ("unstructured", "row", "column", "filter"):
        return Pattern(pattern)  # type: ignore[arg-type]
    if match := re.fullmatch(r"(\d+):(\d+)", pattern):
        n, m = int(match[1]), int(match[2])
        if 1 <= n < m:
            return Pattern("n:m", (n, m))
        raise ValueError(f"N:M keeps N of M weights, with 1 <= N < M; found {pattern!r}")
    if match := re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", pattern):
        return Pattern("block", (int(match[1]), int(match[2])))
    near = difflib.get_close_matches(pattern.lower(), ("unstructured", "row", "column", "filter"), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"pattern must be {_FORMS}; found {pattern!r}{hint}")


def unit_norms(scores: Tensor, pattern: Pattern | str, *, out_dim: int = 0, normalise: bool = False) -> Tensor:
    """See `criteria.unit_scores`."""
    pattern = parse(pattern)
    norms = norms_of(canonical(scores.detach(), pattern, out_dim), pattern)
    return norms / unit_sizes(scores, pattern, out_dim).sqrt().to(norms.dtype) if normalise else norms


def canonical(weight: Tensor, pattern: Pattern, out_dim: int, name: str = "this weight") -> Tensor:
    """The weight as `[O, I, P]`."""
    if out_dim not in (0, 1):
        raise ValueError(f"out_dim must be 0 or 1; found {out_dim}")
    fits = {"row": weight.ndim == 2, "filter": weight.ndim > 2}.get(pattern.kind, weight.ndim >= 2)
    if not fits:
        layers = {"row": "a Linear (2-D)", "filter": "a convolution (3-D or more)"}.get(pattern.kind, "2-D or more")
        raise CompressionError(
            f"pattern {pattern} applies to a weight of {layers}; {name} has shape {tuple(weight.shape)}: exclude it, "
            "or use another pattern for it"
        )
    weight = weight.transpose(0, 1) if out_dim == 1 else weight
    return weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(2)


def restore(mask_OIP: Tensor, shape: torch.Size, out_dim: int) -> Tensor:
    """The inverse of `canonical`."""
    if out_dim == 1:
        mask_OIP = mask_OIP.transpose(0, 1)
    return mask_OIP.reshape(shape).contiguous()


def _blocks(tensor_OIP: Tensor, pattern: Pattern) -> Tensor:
    """`[O / R, R, I / C, C, P]`, padded with zeros."""
    rows, columns = pattern.sizes
    outs, ins, positions = tensor_OIP.shape
    padded = torch.nn.functional.pad(tensor_OIP, (0, 0, 0, -ins % columns, 0, -outs % rows))
    return padded.view(-(-outs // rows), rows, -(-ins // columns), columns, positions)


def norms_of(scores_OIP: Tensor, pattern: Pattern) -> Tensor:
    """L2 norm per unit in fp32, or fp64 for fp64; blocks `[O / R, I / C, P]`, else 1-D."""
    dtype = torch.float64 if scores_OIP.dtype == torch.float64 else torch.float32
    dims = {"row": (1, 2), "filter": (1, 2), "column": (0, 2), "block": (1, 3)}.get(pattern.kind)
    if dims is None:
        raise ValueError(f'only "row", "column", "filter" and "block:RxC" have unit scores; found {pattern}')
    tensor = _blocks(scores_OIP, pattern) if pattern.kind == "block" else scores_OIP
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, dtype=dtype)
    return norms


def unit_sizes(weight: Tensor, pattern: Pattern, out_dim: int) -> Tensor:
    """Number of weights in each unit, fp64, shape of the unit scores; blocks at the edge are smaller."""
    outs, ins = weight.shape[out_dim], weight.shape[1 - out_dim]
    positions = math.prod(weight.shape[2:])
    if pattern.kind != "block":
        units, size = (ins, outs * positions) if pattern.kind == "column" else (outs, ins * positions)
        return torch.full((units,), float(size), dtype=torch.float64, device=weight.device)
    edges = []
    for length, side in zip((outs, ins), pattern.sizes, strict=True):
        starts = torch.arange(0, length, side, dtype=torch.float64, device=weight.device)
        edges.append((length - starts).clamp_(max=side))
    return torch.outer(*edges).unsqueeze(2).expand(-1, -1, positions)


def spread(keep: Tensor, shape_OIP: torch.Size, pattern: Pattern) -> Tensor:
    """The mask `[O, I, P]` of a mask of units."""
    if pattern.kind == "block":
        rows, columns = pattern.sizes
        full = keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return full[: shape_OIP[0], : shape_OIP[1]]
    return keep.view((1, -1, 1) if pattern.kind == "column" else (-1, 1, 1)).expand(shape_OIP)
