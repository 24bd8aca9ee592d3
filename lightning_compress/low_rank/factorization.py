"""Dense weights as products of small ones: SVD of matrices and convolutions, Tucker-2, CP; and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.low_rank import matrices
from lightning_compress.low_rank.decompositions import cp_als, hooi
from lightning_compress.low_rank.methods import MatrixMethod as MatrixMethod
from lightning_compress.low_rank.methods import Method as Method
from lightning_compress.low_rank.methods import MethodName as MethodName
from lightning_compress.low_rank.methods import Ranks as Ranks
from lightning_compress.low_rank.methods import Shape as Shape


class Svd(MatrixMethod):
    """A linear layer (O, I): Linear(I, r) then Linear(r, O)."""

    name = "svd"

    def view(self, weight: Tensor, groups: int) -> Tensor:
        """See `MatrixMethod.view`."""
        return weight[None]

    def unview(self, matrix: Tensor, shape: Shape, groups: int) -> Tensor:
        """See `MatrixMethod.unview`."""
        return matrix[0]

    def to_weights(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.to_weights`."""
        return [factors[0][0], factors[1][0]]

    def from_weights(self, weights: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.from_weights`."""
        return [weights[0][None], weights[1][None]]


class Gates(MatrixMethod):
    """A weight (G H, I) of a recurrent layer with G gates: Linear(I, G r), then one (H, r) for each gate."""

    name = "gates"

    def view(self, weight: Tensor, groups: int) -> Tensor:
        """See `MatrixMethod.view`."""
        return weight.reshape(groups, -1, weight.shape[1])

    def unview(self, matrix: Tensor, shape: Shape, groups: int) -> Tensor:
        """See `MatrixMethod.unview`."""
        return matrix.reshape(shape)

    def to_weights(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.to_weights`."""
        a, b = factors
        return [a.reshape(-1, a.shape[2]), b.reshape(-1, b.shape[2], 1)]

    def from_weights(self, weights: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.from_weights`."""
        first, second = weights
        return [first.reshape(groups, -1, first.shape[1]), second.reshape(groups, -1, second.shape[1])]


class Embedding(MatrixMethod):
    """An embedding (N, D): Embedding(N, r), then Linear(r, D)."""

    name = "embedding"
    whitens = False

    def factorize(self, weight: Tensor, ranks: Ranks, groups: int, covariance: Tensor | None = None) -> list[Tensor]:
        """See `Method.factorize`; rows of zeros, such as that of the padding, stay exactly zero."""
        a, b = super().factorize(weight, ranks, groups, covariance)
        return [a * (weight != 0).any(1).to(a.dtype), b]

    def view(self, weight: Tensor, groups: int) -> Tensor:
        """See `MatrixMethod.view`."""
        return weight.t()[None]

    def unview(self, matrix: Tensor, shape: Shape, groups: int) -> Tensor:
        """See `MatrixMethod.unview`."""
        return matrix[0].t()

    def to_weights(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.to_weights`."""
        return [factors[0][0].t(), factors[1][0]]

    def from_weights(self, weights: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.from_weights`."""
        return [weights[0].t()[None], weights[1][None]]


class Channel(MatrixMethod):
    """A convolution (O, I/G, *k): the same kernel to r channels, then 1 x 1 to O (Zhang et al., TPAMI 2016)."""

    name = "channel"

    def view(self, weight: Tensor, groups: int) -> Tensor:
        """See `MatrixMethod.view`."""
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def unview(self, matrix: Tensor, shape: Shape, groups: int) -> Tensor:
        """See `MatrixMethod.unview`."""
        return matrix.reshape(shape)

    def to_weights(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.to_weights`."""
        a, b = factors
        return [a.reshape(-1, *shape[1:]), b.reshape(shape[0], b.shape[2], *(1 for _ in shape[2:]))]

    def from_weights(self, weights: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.from_weights`."""
        first, second = weights
        return [
            first.reshape(groups, first.shape[0] // groups, -1),
            second.reshape(groups, shape[0] // groups, second.shape[1]),
        ]


class Spatial(MatrixMethod):
    """A 2-D convolution (O, I/G, h, w): h x 1 to r channels, then 1 x w to O (Jaderberg et al., BMVC 2014)."""

    name = "spatial"
    whitens = False

    def view(self, weight: Tensor, groups: int) -> Tensor:
        """See `MatrixMethod.view`: rows are (output, column of the kernel), columns (input, row of the kernel)."""
        o, i, h, w = weight.shape
        grouped = weight.reshape(groups, o // groups, i, h, w)
        return grouped.permute(0, 1, 4, 2, 3).reshape(groups, o // groups * w, i * h)

    def unview(self, matrix: Tensor, shape: Shape, groups: int) -> Tensor:
        """See `MatrixMethod.unview`."""
        o, i, h, w = shape
        return matrix.reshape(groups, o // groups, w, i, h).permute(0, 1, 3, 4, 2).reshape(shape)

    def to_weights(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.to_weights`."""
        (o, i, h, w), (a, b) = shape, factors
        rank = a.shape[1]
        second = b.reshape(groups, o // groups, w, rank).permute(0, 1, 3, 2)
        return [a.reshape(groups * rank, i, h, 1), second.reshape(o, rank, 1, w)]

    def from_weights(self, weights: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.from_weights`."""
        (o, i, h, w), (first, second) = shape, weights
        rank = second.shape[1]
        b = second.reshape(groups, o // groups, rank, w).permute(0, 1, 3, 2)
        return [first.reshape(groups, rank, i * h), b.reshape(groups, o // groups * w, rank)]


class Tucker(Method):
    """A convolution (O, I/G, *k): 1 x 1 to r1, the kernel from r1 to r2, 1 x 1 to O (Kim et al., ICLR 2016).

    Tucker-2 by higher-order orthogonal iteration. The factors are (G, r1, I/G), (G, r2, r1, K) and (G, O/G, r2), with
    K all positions of the kernel.
    """

    name = "tucker"
    ranks = 2

    def full(self, shape: Shape, groups: int) -> Ranks:
        """See `Method.full`."""
        kernel, out = math.prod(shape[2:]), shape[0] // groups
        return min(shape[1], out * kernel), min(out, shape[1] * kernel)

    def unfoldings(self, weight: Tensor, groups: int) -> tuple[Tensor, ...]:
        """See `Method.unfoldings`."""
        cube = self._cube(weight, groups)
        return cube.permute(0, 2, 1, 3).flatten(2), cube.flatten(2)

    def factorize(self, weight: Tensor, ranks: Ranks, groups: int, covariance: Tensor | None = None) -> list[Tensor]:
        """See `Method.factorize`."""
        return hooi(self._cube(matrices.precise(weight), groups), *ranks)

    def merge(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> Tensor:
        """See `Method.merge`."""
        first, core, last = factors
        return torch.einsum("gor,grsk,gsi->goik", last, core, first).reshape(shape)

    def refit(self, factors: Sequence[Tensor], weight: Tensor, groups: int) -> list[Tensor]:
        """See `Method.refit`."""
        first, _, last = (matrices.precise(factor) for factor in factors)
        cube = self._cube(matrices.precise(weight), groups).to(first.dtype)
        left, right = torch.linalg.pinv(last), torch.linalg.pinv(first)
        return [first, torch.einsum("gro,goik,gis->grsk", left, cube, right), last]

    def sizes(self, shape: Shape, ranks: Ranks, groups: int) -> list[int]:
        """See `Method.sizes`."""
        (first, last), kernel = ranks, math.prod(shape[2:])
        return [groups * first * shape[1], groups * last * first * kernel, shape[0] * last]

    def rank_dims(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """See `Method.rank_dims`."""
        return ((0, 1), (1, 2)), ((1, 1), (2, 2))

    def to_weights(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.to_weights`."""
        first, core, last = factors
        ones = [1 for _ in shape[2:]]
        return [
            first.reshape(-1, shape[1], *ones),
            core.reshape(-1, core.shape[2], *shape[2:]),
            last.reshape(shape[0], last.shape[2], *ones),
        ]

    def from_weights(self, weights: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.from_weights`."""
        first, core, last = weights
        return [
            first.reshape(groups, first.shape[0] // groups, shape[1]),
            core.reshape(groups, core.shape[0] // groups, core.shape[1], -1),
            last.reshape(groups, shape[0] // groups, last.shape[1]),
        ]

    def _cube(self, weight: Tensor, groups: int) -> Tensor:
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


class Cp(Method):
    """A 2-D convolution without groups: 1 x 1, h x 1 and 1 x w by channel, 1 x 1 (Lebedev et al., ICLR 2015).

    By alternating least squares. Offered, not advised: trained convolutions need large ranks, and the result is hard
    to train on. The factors are (r, I), (r, h), (r, w) and (O, r).
    """

    name = "cp"

    def full(self, shape: Shape, groups: int) -> Ranks:
        """See `Method.full`: a bound; the smallest rank that suffices cannot be computed."""
        return (math.prod(shape) // max(shape),)

    def unfoldings(self, weight: Tensor, groups: int) -> tuple[Tensor, ...]:
        """See `Method.unfoldings`."""
        return (weight.flatten(1)[None],)

    def factorize(self, weight: Tensor, ranks: Ranks, groups: int, covariance: Tensor | None = None) -> list[Tensor]:
        """See `Method.factorize`."""
        weight = matrices.precise(weight)
        matrices.check_finite(weight)
        o, i, h, w = cp_als(weight, ranks[0])
        return [i.t(), h.t(), w.t(), o]

    def merge(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> Tensor:
        """See `Method.merge`."""
        i, h, w, o = factors
        return torch.einsum("or,ri,rh,rw->oihw", o, i, h, w)

    def refit(self, factors: Sequence[Tensor], weight: Tensor, groups: int) -> list[Tensor]:
        """See `Method.refit`."""
        i, h, w, _ = (matrices.precise(factor) for factor in factors)
        basis = torch.einsum("ri,rh,rw->rihw", i, h, w).flatten(1)
        return [i, h, w, matrices.precise(weight).to(i.dtype).flatten(1) @ torch.linalg.pinv(basis)]

    def sizes(self, shape: Shape, ranks: Ranks, groups: int) -> list[int]:
        """See `Method.sizes`."""
        o, i, h, w = shape
        return [ranks[0] * size for size in (i, h, w, o)]

    def rank_dims(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """See `Method.rank_dims`."""
        return (((0, 0), (1, 0), (2, 0), (3, 1)),)

    def to_weights(self, factors: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.to_weights`."""
        i, h, w, o = factors
        return [i[:, :, None, None], h[:, None, :, None], w[:, None, None, :], o[:, :, None, None]]

    def from_weights(self, weights: Sequence[Tensor], shape: Shape, groups: int) -> list[Tensor]:
        """See `Method.from_weights`."""
        i, h, w, o = weights
        return [i[:, :, 0, 0], h[:, 0, :, 0], w[:, 0, 0, :], o[:, :, 0, 0]]


METHODS: dict[str, Method] = {
    method.name: method for method in (Svd(), Channel(), Spatial(), Tucker(), Cp(), Embedding(), Gates())
}
