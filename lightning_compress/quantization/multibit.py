"""The quantizer of multi-bit codes (`alternating`), and how codes are stored: one bit for each element and code.

Products of two such tensors are counts of equal bits. No runtime of this package computes them like that: the codes
save memory, and bit operations on paper; a model with them runs in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.quantization import functional as qf
from lightning_compress.quantization.alternating import Codes, alternating, coefficients, nearest
from lightning_compress.quantization.layout import Layout
from lightning_compress.quantization.quantizers import Quantizer
from lightning_compress.quantization.spec import Of, QuantSpec

CYCLES = 2  # the paper's; more cost more and gain little


def pack_bits(bits: Tensor) -> Tensor:
    """Pack the last dimension, eight elements a byte, the first in the lowest bit; spare bits of the last byte are 0.

    Args:
        bits: Bool (..., n).

    Returns:
        uint8 (..., ceil(n / 8)).

    Raises:
        TypeError: If `bits` is not bool.

    Example:
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    if bits.dtype != torch.bool:
        raise TypeError(f"bits are a bool tensor; got {bits.dtype}")
    size = -(-bits.shape[-1] // 8)
    packed = torch.zeros(*bits.shape[:-1], size, dtype=torch.uint8, device=bits.device)
    for position in range(8):
        column = bits[..., position::8]
        packed[..., : column.shape[-1]] |= column.to(torch.uint8) << position
    return packed


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack_bits`.

    Args:
        packed: uint8 (..., ceil(length / 8)).
        length: How many bits there are.

    Returns:
        Bool (..., length).

    Raises:
        CompressionError: If the bytes are not that many, or there are bits beyond the end.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3)
        tensor([ True, False,  True])
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-length // 8):
        raise CompressionError(
            f"{length} bits are {-(-length // 8)} bytes of type uint8; found {packed.shape[-1]} of {packed.dtype}: the "
            "file is damaged, or was written for another model"
        )
    positions = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> positions & 1).flatten(-2) == 1
    if bits[..., length:].any():
        raise CompressionError(f"packed codes have bits beyond their {length}th: the file is damaged")
    return bits[..., :length]


@dataclass(frozen=True)
class PackedCodes:
    """Multi-bit codes as they are stored.

    Attributes:
        alphas: Coefficients (R, k), float32.
        bits: uint8 (R, k, ceil(n / 8)), a set bit for +1.
        length: Number n of elements of a row.
        kept: uint8 (R, ceil(n / 8)), 0 where an element is exactly zero; ``None`` if there are none.

    Example:
        >>> from lightning_compress.quantization.alternating import alternating
        >>> packed = PackedCodes.pack(alternating(torch.randn(4, 100), bits=2))
        >>> packed.nbytes  # 4 rows of 2 codes of 13 bytes, and 2 coefficients of 4
        136
    """

    alphas: Tensor
    bits: Tensor
    length: int
    kept: Tensor | None = None

    @staticmethod
    def pack(codes: Codes) -> PackedCodes:
        """Pack codes."""
        kept = None if codes.kept is None or bool(codes.kept.all()) else pack_bits(codes.kept)
        return PackedCodes(codes.alphas.float(), pack_bits(codes.signs), codes.signs.shape[2], kept)

    def unpack(self) -> Codes:
        """The codes again.

        Raises:
            CompressionError: If the parts do not fit together.
        """
        rows, bits = self.alphas.shape
        if self.bits.shape[:2] != (rows, bits) or (self.kept is not None and len(self.kept) != rows):
            raise CompressionError(
                f"coefficients of shape {(rows, bits)} do not belong to codes of shape {tuple(self.bits.shape)}: the "
                "file is damaged, or was written for another model"
            )
        kept = None if self.kept is None else unpack_bits(self.kept, self.length)
        return Codes(self.alphas, unpack_bits(self.bits, self.length), kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.alphas, self.bits, self.kept) if t is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``torch.load(..., weights_only=True)`` reads, on the CPU."""
        kept = None if self.kept is None else self.kept.cpu()
        return {"alphas": self.alphas.cpu(), "bits": self.bits.cpu(), "length": self.length, "kept": kept}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PackedCodes:
        """The inverse of `to_dict`.

        Raises:
            CompressionError: If something is missing.
        """
        if missing := {"alphas", "bits", "length", "kept"} - set(data):
            raise CompressionError(f"packed codes lack {sorted(missing)}: the file is damaged, or something else")
        return PackedCodes(data["alphas"], data["bits"], int(data["length"]), data["kept"])


class MultiBitQuantizer(Quantizer):
    """Alternating multi-bit codes with a straight-through gradient (Xu et al., ICLR 2018).

    The codes of a tensor are found anew in each call, those of activations as well, so there is nothing to observe and
    nothing to learn. A weight of exactly zero stays zero (a mask may have put it there) and does not count, although
    sums of signs have no zero; trained weights that are not masked never are.

    Args:
        spec: What to quantize to, 1 to 4 bits. Granularity ``"channel"`` is the paper's for weights: one set of
            coefficients for each row. Activations have one set for the tensor, for each token, or for each sample.
        layout: Which elements share coefficients.
        of: ``"weights"`` or ``"activations"``.

    Example:
        >>> quantizer = MultiBitQuantizer(QuantSpec(bits=2, method="alternating"), Layout(), "weights")
        >>> quantizer.fake_quantize(torch.tensor([0.1, -0.3, 0.9, 1.1]))
        tensor([ 0.2000, -0.2000,  1.0000,  1.0000])
    """

    def __init__(self, spec: QuantSpec, layout: Layout, of: Of) -> None:
        if not 1 <= spec.bits <= 4:
            raise ValueError(f"alternating codes have 1 to 4 bits; got bits={spec.bits}")
        super().__init__(spec, layout, of)

    def _sign_of_spec(self) -> bool:
        return True

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        rows, kept = self._problem(x)
        value = nearest(rows, coefficients(rows, self.spec.bits, CYCLES, kept))
        return qf.straight_through(x, self._back(value if kept is None else value * kept, x))

    def codes(self, x: Tensor) -> PackedCodes:
        """What is stored of a tensor.

        Args:
            x: The tensor.

        Returns:
            Its codes, row by row; `decode` makes of them what `fake_quantize` makes of the tensor.
        """
        rows, kept = self._problem(x)
        return PackedCodes.pack(alternating(rows, self.spec.bits, CYCLES, kept))

    def decode(self, codes: PackedCodes, shape: Sequence[int]) -> Tensor:
        """The tensor that codes stand for, float32.

        Args:
            codes: As `codes` returned them.
            shape: Shape of the tensor.

        Raises:
            CompressionError: If the codes are damaged, or of another shape.
        """
        like = codes.alphas.new_empty(tuple(shape))
        expected = self._matrix(like).shape
        if (len(codes.alphas), codes.length) != expected:
            raise CompressionError(
                f"a tensor of shape {tuple(shape)} has codes of {tuple(expected)} elements, not of "
                f"{(len(codes.alphas), codes.length)}: these belong to another tensor"
            )
        return self._back(codes.unpack().rows(), like)

    @property
    def levels(self) -> tuple[int, int]:
        """See `Quantizer.levels`; only one bit has any."""
        if self.spec.bits > 1:
            raise CompressionError(f"sums of {self.spec.bits} scaled signs lie on no grid of integers; use `codes`")
        return -1, 1

    def scale_zero_point(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Quantizer.scale_zero_point`; only one bit has a grid, ``{-1, 0, 1}``."""
        _ = self.levels
        if x is None or self.spec.dynamic:
            raise CompressionError("the scale of alternating codes is that of a weight, which has to be passed")
        rows, kept = self._problem(x)
        scale = coefficients(rows, 1, kept=kept).float().reshape(self.layout.size)
        return scale, torch.zeros_like(scale)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Quantizer.integers`; only one bit has them."""
        scale, zero_point = self.scale_zero_point(x)
        q = torch.where(x < 0, -1, 1) if self.of == "activations" else x.detach().sign()
        return q.to(torch.int8), scale, zero_point.long()

    def bops(self, macs: int, other_bits: int) -> int:
        """Bit operations of a layer: each pair of codes is one product of bits for each multiply-accumulate.

        Args:
            macs: Multiply-accumulates of the layer.
            other_bits: Bits of the other factor; 32 if it is not quantized.
        """
        return macs * self.spec.bits * other_bits

    # ------------------------------------------------------------------------------------------------------------ rows
    def _problem(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = self._matrix(qf.exact(x.detach()))
        return rows, rows != 0 if self.of == "weights" else None

    def _matrix(self, x: Tensor) -> Tensor:
        """What shares coefficients, as rows (R, n)."""
        if self.spec.granularity == "token":
            return x.reshape(-1, x.shape[-1])
        if self.spec.granularity == "sample":
            return x.reshape(x.shape[0], -1)
        rows = self.layout.rows(x)
        dims = self.layout.dims(rows)
        if dims is None:
            return x.reshape(1, -1)
        order, count = _order(rows, dims)
        return rows.permute(order).reshape(count, -1)

    def _back(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_matrix`."""
        rows = self.layout.rows(like)
        dims = self.layout.dims(rows)
        if self.spec.dynamic or dims is None:
            return matrix.reshape(like.shape)
        order, _ = _order(rows, dims)
        back = sorted(range(len(order)), key=order.__getitem__)
        return self.layout.back(matrix.reshape([rows.shape[d] for d in order]).permute(back), like)


def _order(rows: Tensor, dims: tuple[int, ...]) -> tuple[list[int], int]:
    """The dimensions with those that share coefficients last, and how many sets there are."""
    own = [d for d in range(rows.dim()) if d not in dims]
    return [*own, *dims], math.prod(rows.shape[d] for d in own)
